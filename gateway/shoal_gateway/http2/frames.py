"""HTTP/2's frames as bytes, and what may be wrong with them (RFC 9113, sections 4, 6 and 7)."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client says first."""
HEAD = struct.Struct(">IBI")
"""Before each frame: its length (24 bits) and kind, its flags, its stream."""
LARGEST_WINDOW = 2**31 - 1
SMALLEST_FRAME, LARGEST_FRAME = 16384, 2**24 - 1
"""What each side takes at least, and what it can be told to."""


class Kind(IntEnum):
    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(IntEnum):
    END_STREAM = 0x1
    ACK = 0x1
    END_HEADERS = 0x4
    PADDED = 0x8
    PRIORITY = 0x20


class Setting(IntEnum):
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ErrorCode(IntEnum):
    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ProtocolError(Exception):
    """The client breaks the protocol: its connection ends."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


def frame(kind: Kind, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def settings(values: dict[Setting, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(Kind.SETTINGS, 0, 0, b"".join(struct.pack(">HI", name, value) for name, value in values.items()))


def told_settings(payload: bytes) -> dict[int, int]:
    """What a SETTINGS frame says, by the settings' numbers: there are more than we know."""
    if len(payload) % 6:
        raise ProtocolError("SETTINGS: a length that isn't a multiple of 6", ErrorCode.FRAME_SIZE_ERROR)
    told = dict(struct.iter_unpack(">HI", payload))
    if told.get(Setting.INITIAL_WINDOW_SIZE, 0) > LARGEST_WINDOW:
        raise ProtocolError("SETTINGS: an initial window that is too large", ErrorCode.FLOW_CONTROL_ERROR)
    if not SMALLEST_FRAME <= told.get(Setting.MAX_FRAME_SIZE, SMALLEST_FRAME) <= LARGEST_FRAME:
        raise ProtocolError("SETTINGS: a largest frame that can't be")
    return told


def number(payload: bytes) -> int:
    """The one number of a WINDOW_UPDATE or RST_STREAM frame; of the former without the reserved bit."""
    if len(payload) != 4:
        raise ProtocolError("a frame of another length than 4", ErrorCode.FRAME_SIZE_ERROR)
    return int.from_bytes(payload, "big")


def window_update(stream: int, bytes: int) -> bytes:
    """A WINDOW_UPDATE frame: the other side may send so much more."""
    return frame(Kind.WINDOW_UPDATE, 0, stream, bytes.to_bytes(4, "big"))


def reset(stream: int, code: ErrorCode) -> bytes:
    """A RST_STREAM frame."""
    return frame(Kind.RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last: int, code: ErrorCode, why: str = "") -> bytes:
    """A GOAWAY frame: streams after `last` aren't looked at."""
    return frame(Kind.GOAWAY, 0, 0, struct.pack(">II", last, code) + why.encode()[:256])


def unpadded(flags: int, payload: bytes) -> bytes:
    """A DATA or HEADERS frame's payload without its padding."""
    if not flags & Flag.PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ProtocolError("a frame of more padding than it has")
    return payload[1 : len(payload) - payload[0]]
