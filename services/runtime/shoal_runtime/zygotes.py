"""Keeps the node's zygote running: wants it for as long as the service runs, and has it started where it isn't."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import structlog
from shoal_bus.errors import Unavailable
from shoal_bus.limits import inherited_open_files

from shoal_runtime.connection import open_socket
from shoal_runtime.shim import protocol, zygote

log = structlog.get_logger(__name__)

T = TypeVar("T")

START_SECONDS = 10.0


class ZygoteKeeper:
    """The zygote of the state directory `state`, as one copy of the service wants it."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._connection: asyncio.StreamWriter | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def close(self) -> None:
        """Wants it no longer."""
        self._closed = True
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)
        if self._connection is not None:
            self._connection.close()

    async def want(self) -> None:
        """Keeps a connection to the zygote, and starts it where there is none."""
        if self._connection is not None and not self._connection.is_closing():
            return
        async with self._starting:
            if self._connection is not None and not self._connection.is_closing():
                return
            reader, writer = await self.reach(self._connect)
            self._connection = writer
            self._hearing = asyncio.create_task(self._hear(reader, writer))

    async def _hear(self, reader: asyncio.StreamReader, zygote: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while await reader.read(4096):
                pass
        zygote.close()
        if self._connection is zygote:  # and nobody has had it started again already
            self._connection = None
        if not self._closed:
            log.warning("zygote.lost")
            await self.want()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(sock=open_socket(str(self._state), protocol.ZYGOTE_SOCKET))

    async def reach(self, connect: Callable[[], Awaitable[T]]) -> T:
        """What `connect` does at one of its sockets; the zygote is started where nobody listens."""
        ends = time.monotonic() + START_SECONDS
        while True:
            try:
                return await connect()
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > ends:
                    raise Unavailable("the zygote doesn't start", hint="see the runtime service's log") from None
            starting = await asyncio.create_subprocess_exec(
                *zygote.command(str(self._state), inherited_open_files()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
            await starting.wait()
            await asyncio.sleep(0.01)
