"""A table of a TOML file, read key by key: what is of the wrong type is an error, what is left over can be named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from shoal_bus.errors import InvalidArgument

T = TypeVar("T")
_KINDS = {str: "text", int: "an integer", dict: "a table", list: "an array"}


class Table:
    """The table at `path`, as `plugins."io.containerd.gc.v1.scheduler"`; empty for the file itself."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values, self.path = dict(values), path

    def text(self, key: str) -> str:
        """Takes a text; empty where there is none."""
        return self._take(key, str) or ""

    def integer(self, key: str) -> int:
        """Takes an integer; 0 where there is none."""
        return self._take(key, int) or 0

    def texts(self, key: str) -> list[str]:
        """Takes an array of texts; empty where there is none."""
        found = self._take(key, list) or []
        if not all(isinstance(one, str) for one in found):
            raise InvalidArgument(f"{self.name(key)}: must be an array of text")
        return found

    def table(self, key: str) -> Table:
        """Takes a table; empty where there is none."""
        return Table(self._take(key, dict) or {}, self.name(key))

    def tables(self) -> Iterator[tuple[str, Table]]:
        """Takes all that is left, every key of which must be a table."""
        for key in list(self._values):
            yield key, self.table(key)

    def left(self) -> list[str]:
        """The keys that nobody took."""
        return list(self._values)

    def set(self, key: str) -> bool:
        """Takes any value; whether it says anything: containerd's own files say nothing by 0, "", false and []."""
        value = self._values.pop(key, None)
        return any(map(bool, value.values())) if isinstance(value, dict) else bool(value)

    def name(self, key: str) -> str:
        """A key with the path of its table, as TOML has it."""
        shown = key if key.replace("_", "").replace("-", "").isalnum() else f'"{key}"'
        return f"{self.path}.{shown}" if self.path else shown

    def _take(self, key: str, kind: type[T]) -> T | None:
        value = self._values.pop(key, None)
        if value is None:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InvalidArgument(f"{self.name(key)}: must be {_KINDS[kind]}, not {value!r}")
        return value
