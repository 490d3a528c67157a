"""Durations as Go's programs write them: https://pkg.go.dev/time#ParseDuration."""

from __future__ import annotations

import re

from shoal_bus.errors import InvalidArgument

_UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(rf"(\d+\.?\d*|\.\d+)({'|'.join(_UNITS)})")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")
_LEAST_SECONDS = 1e-3


def seconds_of(text: str, name: str) -> float:
    """A duration of a millisecond or more in seconds: `1m30s` is 90. INVALID_ARGUMENT, with the key's name."""
    if not _WHOLE.fullmatch(text):
        raise InvalidArgument(f"{name}: {text!r} is no duration", hint="write it as 10s, 1m30s or 500ms")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    if seconds < _LEAST_SECONDS:
        raise InvalidArgument(f"{name}: {text!r} is too short", hint="a millisecond is the least")
    return seconds


def duration_of(seconds: float) -> str:
    """The same the other way, as `seconds_of` reads it: 90 is `1m30s`."""
    minutes, rest = divmod(round(seconds * 1e3), 60_000)
    hours, minutes = divmod(minutes, 60)
    shown = f"{hours}h" * bool(hours) + f"{minutes}m" * bool(minutes)
    return shown + (f"{rest / 1e3:g}s" if rest or not shown else "")
