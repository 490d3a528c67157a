"""The limit on open files: a service may need one for each of thousands of things, and what it starts may not."""

from __future__ import annotations

import resource

_inherited: int | None = None


def raise_open_files() -> None:
    """Raises this process's soft limit on open files to the hard one (setrlimit(2), RLIMIT_NOFILE)."""
    global _inherited  # noqa: PLW0603 (the limit is the process's, too)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _inherited = soft if _inherited is None else _inherited
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def inherited_open_files() -> int:
    """The soft limit this process was started with: what it starts for others should have that one."""
    return _inherited if _inherited is not None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
