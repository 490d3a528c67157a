"""What the transform `format` fills in: `{{ mount N }}`, `{{ source N }}`, `{{ target N }}`, `{{ overlay A B }}`.

Containerd takes Go's whole template language there; these four are all that has a meaning in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shoal_bus.api.runtime import ActiveMount
from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Mount

_OPENS, _CLOSES = "{{", "}}"
_ONE = re.compile(r"\s*(mount|source|target)\s+([0-9]{1,3})\s*")
_RANGE = re.compile(r"\s*overlay\s+([0-9]{1,3})\s+([0-9]{1,3})\s*")
_SHOWN = 60


def filled_in(mount: Mount, active: Sequence[ActiveMount]) -> Mount:
    """A mount with its source, target and options filled in from those before it. INVALID_ARGUMENT."""
    return mount.model_copy(
        update={
            "source": expand(mount.source, active),
            "target": expand(mount.target, active),
            "options": [expand(option, active) for option in mount.options],
        }
    )


def expand(text: str, active: Sequence[ActiveMount]) -> str:
    """A text with all of its templates filled in. INVALID_ARGUMENT for one that is none, or of a mount not there."""
    done = []
    while _OPENS in text:
        before, _, rest = text.partition(_OPENS)
        inside, closes, text = rest.partition(_CLOSES)
        if not closes:
            raise InvalidArgument(f"template {_OPENS}{inside[:_SHOWN]!r}: isn't closed")
        done += [before, _value(inside, active)]
    return "".join([*done, text])


def _value(inside: str, active: Sequence[ActiveMount]) -> str:
    if found := _ONE.fullmatch(inside):
        one = active[_checked(int(found[2]), inside, active)]
        match found[1]:
            case "mount":
                return one.mount_point
            case "source":
                return one.mount.source
            case _:
                return one.mount.target
    if found := _RANGE.fullmatch(inside):
        first, last = (_checked(int(number), inside, active) for number in found.groups())
        step = 1 if first <= last else -1
        return ":".join(active[number].mount_point for number in range(first, last + step, step))
    raise InvalidArgument(
        f"template {_OPENS}{inside[:_SHOWN]}{_CLOSES}: is none",
        hint="there are mount N, source N, target N and overlay A B",
    )


def _checked(number: int, inside: str, active: Sequence[ActiveMount]) -> int:
    if number >= len(active):
        raise InvalidArgument(f"template {_OPENS}{inside}{_CLOSES}: there are {len(active)} active mounts before it")
    return number
