"""Detach keys: what is typed to leave a container's terminal without ending what runs there."""

from __future__ import annotations

from shoal_bus.errors import InvalidArgument

DEFAULT = "ctrl-p,ctrl-q"


def parse_keys(text: str) -> bytes:
    """`ctrl-p,ctrl-q` as the bytes a terminal sends: single characters, or ctrl- with a letter or one of @[\\]^_.

    >>> parse_keys("ctrl-p,q")
    b'\\x10q'
    """
    keys = bytearray()
    for key in text.split(",") if text else []:
        control = key.lower().removeprefix("ctrl-")
        if key.isascii() and len(key) == 1:
            keys += key.encode()
        elif control != key.lower() and len(control) == 1 and control in "@abcdefghijklmnopqrstuvwxyz[\\]^_":
            keys.append(ord(control.upper()) & 0x1F)
        else:
            raise InvalidArgument(
                f"--detach-keys {text!r}: {key!r} is no key", hint="as ctrl-p,ctrl-q or ctrl-],x; empty for none"
            )
    return bytes(keys)


class KeyWatch:
    """Finds the keys in what is typed, however it is cut into pieces; without keys, never."""

    def __init__(self, keys: bytes) -> None:
        self._keys, self._held = keys, b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the keys have come. A beginning of them is held back until it is clear."""
        if not self._keys:
            return data, False
        data = self._held + data
        at = data.find(self._keys)
        if at >= 0:
            return data[:at], True
        held = next((n for n in range(len(self._keys) - 1, 0, -1) if data.endswith(self._keys[:n])), 0)
        self._held = data[len(data) - held :]
        return data[: len(data) - held], False
