"""NATS's client protocol, as it is read and written for each message: what costs a service most of its time.

nats-py's own parser and encoder take several times as long: they match every line against a handful of regular
expressions, and copy what is left behind each message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nats.errors import BadHeaderError, ProtocolError

from shoal_bus import wire

_END = b"\r\n"
_LONGEST_LINE = 64 * 1024
"""Bytes of a line outside a payload: the server lets its clients write 4 KiB, and its own INFO may be longer."""
_HEADERS = b"NATS/1.0\r\n"
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_OFTEN = frozenset({wire.REQUEST_ID, wire.TIMEOUT, wire.TRACEPARENT})
"""Names that needn't be looked at."""
_BREAKS = str.maketrans({"\r": " ", "\n": " "})


def pub(subject: str, reply: str, payload: bytes, headers: Mapping[str, str] | None) -> bytes:
    """The command that publishes a message."""
    if headers is None:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(payload), payload)
    lines = []
    for name, value in headers.items():
        if not _NAME.fullmatch(name):
            raise BadHeaderError(name)
        text = str.strip(value)
        lines.append(f"{name}: {text if text.isprintable() else text.translate(_BREAKS)}\r\n")
    block = _HEADERS + "".join(lines).encode() + _END
    size = len(block)
    return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
        subject.encode(), reply.encode(), size, size + len(payload), block, payload,
    )  # fmt: skip


def plain_headers(block: bytes) -> dict[str, str] | None:
    """A message's headers, or None for a block that has a status of the server's in its first line."""
    if not block.startswith(_HEADERS):
        return None
    headers = {}
    for line in block[len(_HEADERS) :].decode("utf-8", "replace").split("\r\n"):
        name, colon, value = line.partition(": ")
        if colon and name in _OFTEN:
            headers[name] = value.strip()
            continue
        name, colon, value = line.partition(":")
        name = name.strip()
        if colon and name.isascii() and not any(map(str.isspace, name)):
            headers[name] = value.strip()
    return headers


class Parser:
    """Takes apart what the server sends, and hands it to `nc`: in the place of nats-py's `nats.protocol.parser`."""

    def __init__(self, nc: Any) -> None:
        self._nc = nc
        self.reset()

    def reset(self) -> None:
        """Forgets what has come in part."""
        self._pieces: list[bytes] = []
        self._missing = 0

    async def parse(self, data: bytes = b"") -> None:
        """Handles every message that is complete with `data`. What it calls doesn't wait (see `receiver`)."""
        self._missing -= len(data)
        if self._missing > 0:
            self._pieces.append(data)  # a large message is put together once, and not with each of its pieces
            return
        if self._pieces:
            data = b"".join((*self._pieces, data))
        self.reset()
        at = 0
        while at < len(data):
            line = data.find(_END, at)
            if line < 0:
                if len(data) - at > _LONGEST_LINE:
                    raise ProtocolError("nats: a line without an end")
                break
            if data.startswith((b"MSG ", b"HMSG "), at):
                end = await self._message(data, at, line)
            else:
                end = line + 2
                await self._control(data[at:line])
            if end > len(data):
                self._missing = end - len(data)
                break
            at = end
        if at < len(data):
            self._pieces.append(data[at:])

    async def _message(self, data: bytes, at: int, line: int) -> int:
        """Hands a message on if it is there to its end; where that is."""
        operation, *fields = data[at:line].split()
        try:
            subject, sid = fields[0], int(fields[1])
            sizes = [int(field) for field in (fields[-2:] if operation == b"HMSG" else fields[-1:])]
            reply = b"" if len(fields) == 2 + len(sizes) else fields[2]
        except (IndexError, ValueError):
            raise ProtocolError("nats: malformed MSG") from None
        begin = line + 2
        end = begin + sizes[-1]
        if end + 2 <= len(data):
            body = begin + sizes[0] if len(sizes) == 2 else begin
            await self._nc._process_msg(sid, subject, reply, data[body:end], data[begin:body])
        return end + 2

    async def _control(self, line: bytes) -> None:
        operation = line.split(None, 1)[0] if line.strip() else b""
        if operation == b"PING":
            await self._nc._process_ping()
        elif operation == b"PONG":
            await self._nc._process_pong()
        elif operation == b"-ERR":
            await self._nc._process_err(line[len(operation) :].strip().decode("utf-8", "replace").lower())
        elif operation == b"INFO":
            await self._nc._process_info(json.loads(line[len(operation) :]))
        elif operation != b"+OK":
            raise ProtocolError("nats: unknown protocol")
