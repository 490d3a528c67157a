"""A connection of the runtime service to one shim: requests by number, and what the shim says unasked."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Protocol

import structlog
from shoal_bus.errors import BY_CODE, Code, Unavailable

from shoal_runtime.shim import protocol

log = structlog.get_logger(__name__)

CALL_SECONDS = 60.0


class Owner(Protocol):
    """Who hears what a shim says unasked, and that its connection has ended."""

    def exited(self, hello: dict[str, Any], event: dict[str, Any]) -> None: ...

    def out_of_memory(self, hello: dict[str, Any], event: dict[str, Any]) -> None: ...

    def lost(self, shim: ShimConnection, orderly: bool) -> None: ...


class ShimConnection:
    """A connection to one shim: requests by number, and what it says unasked."""

    def __init__(self, owner: Owner, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._owner, self.name, self._writer = owner, name, writer
        self.hello: dict[str, Any] = {}
        self.closed = False
        self._number = 1
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._hello = asyncio.Event()
        self._orderly = False
        self._reading = asyncio.create_task(self._read(reader))

    async def greeted(self) -> None:
        """Returns when the shim has said who it is."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._hello.wait()
        except TimeoutError:
            raise Unavailable("a shim doesn't answer") from None
        if self.closed:
            raise ConnectionResetError

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request and its reply. Raises what the shim answered; UNAVAILABLE when it is gone."""
        self._number += 1
        number = self._number
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            if self.closed:
                raise Unavailable("the shim is gone")
            self._writer.write(protocol.encode(request | {"n": number}))
            async with asyncio.timeout(CALL_SECONDS):
                reply = await answer
        finally:
            self._waiting.pop(number, None)
        if (error := reply.get("error")) is not None:
            raise BY_CODE[Code[error["code"]]](error["message"], hint=error.get("hint", ""))
        return reply

    async def close(self) -> None:
        self._orderly = True
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = protocol.Decoder()
        try:
            while data := await reader.read(65536):
                for message in decoder.feed(data):
                    self._heard(message)
        except (OSError, ValueError) as error:
            log.warning("shim.connection", error=str(error))
        finally:
            self.closed = True
            self._hello.set()
            self._writer.close()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(Unavailable("the shim is gone"))
            self._owner.lost(self, self._orderly)

    def _heard(self, message: dict[str, Any]) -> None:
        match message.get("event"):
            case "hello":
                self.hello = message
                self._hello.set()
            case "exit":
                self._owner.exited(self.hello, message)
            case "oom":
                self._owner.out_of_memory(self.hello, message)
            case "bye":
                self._orderly = True
            case None:
                waiting = self._waiting.get(message.get("n", 0))
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case other:
                log.debug("shim.unknown_event", event_name=other)


async def open_socket(directory: str, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the socket `name` in `directory`. OSError when nobody listens there."""
    connection = socket.socket(fileno=protocol.connect(directory, name).detach())
    connection.setblocking(False)
    return await asyncio.open_unix_connection(sock=connection)
