"""What a registry is asked and answers, shown to whoever asks for it: through a FIFO, while somebody reads that."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import aiohttp
from shoal_bus.errors import NotFound

_SECRET = frozenset({"authorization", "cookie", "proxy-authorization", "set-cookie"})


class RequestLog:
    """Requests and responses without their bodies, in the form of HTTP/1.1. What nobody reads in time is left out."""

    def __init__(self, place: Path) -> None:
        """NOT_FOUND where there is no FIFO, or nobody has it open."""
        try:
            self._fd = os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            raise _missing(place) from None
        if not stat.S_ISFIFO(os.fstat(self._fd).st_mode):
            self.close()
            raise _missing(place)
        self.config = aiohttp.TraceConfig()
        self.config.on_request_start.append(self._asked)
        self.config.on_request_end.append(self._answered)

    def close(self) -> None:
        """Whoever reads sees the end of it."""
        os.close(self._fd)

    async def _asked(
        self, session: aiohttp.ClientSession, context: SimpleNamespace, told: aiohttp.TraceRequestStartParams
    ) -> None:
        self._write(f"{told.method} {told.url.raw_path_qs} HTTP/1.1", {"Host": told.url.authority} | dict(told.headers))

    async def _answered(
        self, session: aiohttp.ClientSession, context: SimpleNamespace, told: aiohttp.TraceRequestEndParams
    ) -> None:
        response = told.response
        self._write(f"HTTP/1.1 {response.status} {response.reason or ''}".rstrip(), dict(response.headers))

    def _write(self, first: str, headers: Mapping[str, str]) -> None:
        lines = [f"{key}: {'<redacted>' if key.lower() in _SECRET else value}" for key, value in headers.items()]
        text = "\r\n".join([first, *lines, "", ""])
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, text.encode(errors="replace")[:4096])  # whole or not at all (pipe(7))


def _missing(place: Path) -> NotFound:
    return NotFound(f"request log {place.name}: isn't in {place.parent}", hint="it's a FIFO that somebody has open")
