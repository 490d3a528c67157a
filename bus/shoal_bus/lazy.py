"""Modules that are loaded when they are used, and not when somebody imports them.

`importlib.util.LazyLoader` can't do it here: it loads as soon as a second `import` looks at the module's `__spec__`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Later(ModuleType):
    """Stands for a module until one of its attributes is used, and gives way to it then."""

    def __getattr__(self, attribute: str) -> Any:
        name = self.__name__
        if sys.modules.get(name) is self:
            del sys.modules[name]
        return getattr(import_module(name), attribute)


def lazily(name: str) -> None:
    """Has the module `name`, where it is installed and isn't loaded yet, load when one of its attributes is used."""
    if name not in sys.modules and find_spec(name) is not None:
        sys.modules[name] = _Later(name)
