"""Small checks that a JSON value's shape is put together from: each takes a value and raises `Wrong` if it isn't one.

As Go's decoder has it, and so every OCI runtime, null stands for a field that isn't there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Check = Callable[[Any], None]

INT32, UINT16, UINT32 = 2**31 - 1, 2**16 - 1, 2**32 - 1
INT64, UINT64 = 2**63 - 1, 2**64 - 1


class Wrong(Exception):
    """A value breaks `rule`; where it is in the whole is added on the way out."""

    def __init__(self, rule: str, path: str = "") -> None:
        self.rule, self.path = rule, path
        super().__init__(rule)

    def __str__(self) -> str:
        return f"{self.path}: {self.rule}" if self.path else self.rule

    def within(self, step: str) -> Wrong:
        """The same, of a value that is `step` in another one."""
        self.path = f"{step}{self.path}" if self.path.startswith("[") or not self.path else f"{step}.{self.path}"
        return self


def boolean(value: Any) -> None:
    if value is not True and value is not False:
        raise Wrong("must be true or false")


def integer(low: int = -INT64 - 1, high: int = INT64) -> Check:
    """A whole number from `low` to `high`."""

    def check(value: Any) -> None:
        if type(value) is not int:
            raise Wrong("must be a whole number")
        if not low <= value <= high:
            raise Wrong(f"must be from {low} to {high}, and is {value}")

    return check


uint32 = integer(0, UINT32)
uint64 = integer(0, UINT64)
int32 = integer(-INT32 - 1, INT32)
int64 = integer()


def any_text(value: Any) -> None:
    if not isinstance(value, str):
        raise Wrong("must be a text")


def some_text(value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise Wrong("must be a text that isn't empty")


def plain_text(value: Any) -> None:
    """What a process or a system call can be given: no NUL ends it early."""
    any_text(value)
    if "\0" in value:
        raise Wrong("must not hold a NUL")


def absolute_path(value: Any) -> None:
    plain_text(value)
    if not value.startswith("/"):
        raise Wrong("must be an absolute path")


def matching(pattern: str, what: str) -> Check:
    """A text that is `what`."""
    compiled = re.compile(pattern)

    def check(value: Any) -> None:
        any_text(value)
        if not compiled.fullmatch(value):
            raise Wrong(f"{value[:60]!r} must be {what}")

    return check


def one_of(*names: str) -> Check:
    """One of a few texts."""
    known = frozenset(names)

    def check(value: Any) -> None:
        any_text(value)
        if value not in known:
            raise Wrong(f"{value[:60]!r} must be one of {', '.join(names)}")

    return check


def many(check_one: Check, *, least: int = 0) -> Check:
    """A list of such values, with `least` of them at least."""

    def check(value: Any) -> None:
        if not isinstance(value, list):
            raise Wrong("must be a list")
        if len(value) < least:
            raise Wrong(f"must hold {least} or more")
        for index, one in enumerate(value):
            try:
                check_one(one)
            except Wrong as wrong:
                raise wrong.within(f"[{index}]") from None

    return check


def map_of(check_one: Check) -> Check:
    """A map from texts to such values."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise Wrong("must be a map")
        for key, one in value.items():
            some_text(key)
            try:
                check_one(one)
            except Wrong as wrong:
                raise wrong.within(key) from None

    return check


def record(fields: dict[str, Check], required: Sequence[str] = ()) -> Check:
    """A map with these fields, of which some must be there. What else it has is ignored, as OCI says."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise Wrong("must be a map")
        for name in required:
            if value.get(name) is None:
                raise Wrong("is missing", name)
        for name, check_one in fields.items():
            one = value.get(name)
            if one is not None:
                try:
                    check_one(one)
                except Wrong as wrong:
                    raise wrong.within(name) from None

    return check
