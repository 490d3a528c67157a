"""What gRPC lays into HTTP/2: a call's head, its messages, and its end (gRPC's "PROTOCOL-HTTP2").

What is sent is compressed as little as HPACK allows: literals that neither side has to remember.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote_from_bytes

from shoal_bus.errors import Code, ResourceExhausted, Unimplemented

LARGEST_MESSAGE = 16 << 20
"""What containerd takes, and its clients send at most."""
PREFIX = struct.Struct(">BI")
"""Before each message: whether it is compressed, and its length."""
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_SHOWN = 4096
"""Bytes of an error's text: clients take no more than 8 or 16 KiB of headers."""
_UNESCAPED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


@dataclass(frozen=True, slots=True)
class Head:
    """What a call begins with."""

    path: str
    metadata: dict[str, str]
    """The caller's, without what is binary."""
    timeout: float | None
    """Seconds, where the caller says how long it waits."""


def head_of(headers: Sequence[tuple[str, str]]) -> Head | None:
    """A call's head, or None for a request that isn't gRPC's.

    Of a header's values the first counts: a client that names another namespace within one's own puts it first.
    """
    told = {name: value for name, value in reversed(headers) if not name.endswith("-bin")}
    path = told.pop(":path", "")
    is_grpc = told.pop(":method", "") == "POST" and told.get("content-type", "").startswith("application/grpc")
    if not is_grpc or not path:
        return None
    timeout = _TIMEOUT.fullmatch(told.get("grpc-timeout", ""))
    return Head(path, told, int(timeout[1]) * _SECONDS[timeout[2]] if timeout else None)


class Messages:
    """Takes the messages out of a stream's bytes."""

    def __init__(self) -> None:
        self._prefix = b""
        self._pieces: list[bytes] = []
        self._missing = 0

    def take(self, data: bytes) -> list[bytes]:
        """Those that are whole with `data`. RESOURCE_EXHAUSTED for one that is too large, UNIMPLEMENTED."""
        whole: list[bytes] = []
        at = 0
        while at < len(data):
            if len(self._prefix) < PREFIX.size:
                piece = data[at : at + PREFIX.size - len(self._prefix)]
                self._prefix += piece
                at += len(piece)
                if len(self._prefix) < PREFIX.size:
                    break
                compressed, self._missing = PREFIX.unpack(self._prefix)
                if compressed:
                    raise Unimplemented("grpc: compressed messages aren't taken", hint="send them as they are")
                if self._missing > LARGEST_MESSAGE:
                    raise ResourceExhausted(
                        f"grpc: received message larger than max ({self._missing} vs. {LARGEST_MESSAGE})"
                    )
            piece = data[at : at + self._missing]
            at += len(piece)
            self._missing -= len(piece)
            self._pieces.append(piece)
            if not self._missing:
                whole.append(b"".join(self._pieces))
                self._prefix, self._pieces = b"", []
        return whole


def _literal(name: str, value: str) -> bytes:
    """A header field that isn't to be indexed (RFC 7541, 6.2.2)."""
    return b"\x00" + _text(name) + _text(value)


def _text(value: str) -> bytes:
    data = value.encode("ascii")
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, length = len(data) - 127, bytearray(b"\x7f")
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([*length, rest]) + data


HEADERS = b"\x88" + _literal("content-type", "application/grpc")
"""`:status: 200`, from HPACK's own table, and what it is."""
OK = _literal("grpc-status", "0")


def trailers(code: Code, message: str) -> bytes:
    """How a call ends that is refused."""
    text = quote_from_bytes(message.encode()[:_SHOWN], safe=_UNESCAPED)
    return _literal("grpc-status", str(int(code))) + _literal("grpc-message", text)
