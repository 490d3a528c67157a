"""A connection of the runtime service to one shim: requests by number, and what the shim says unasked."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Protocol, cast

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


class ShimConnection(asyncio.Protocol):
    """A connection to one shim, made by `connect`: requests by number, and what it says unasked."""

    def __init__(self, owner: Owner, name: str) -> None:
        loop = asyncio.get_running_loop()
        self._owner, self.name = owner, name
        self.hello: dict[str, Any] = {}
        self.closed = False
        self._number = 1
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._greeted: asyncio.Future[None] = loop.create_future()
        self._gone: asyncio.Future[None] = loop.create_future()
        self._orderly = False
        self._decoder = protocol.Decoder()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, owner: Owner, name: str, directory: str, socket_name: str) -> ShimConnection:
        """A connection to the socket `socket_name` in `directory`. OSError when nobody listens there."""
        connection = cls(owner, name)
        await asyncio.get_running_loop().create_unix_connection(
            lambda: connection, sock=open_socket(directory, socket_name)
        )
        return connection

    async def greeted(self) -> None:
        """Returns when the shim has said who it is."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await asyncio.shield(self._greeted)
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
            if self.closed or self._transport is None:
                raise Unavailable("the shim is gone")
            self._transport.write(protocol.encode(request | {"n": number}))
            async with asyncio.timeout(CALL_SECONDS):
                reply = await answer
        finally:
            self._waiting.pop(number, None)
        if (error := reply.get("error")) is not None:
            raise BY_CODE[Code[error["code"]]](error["message"], hint=error.get("hint", ""))
        return reply

    async def close(self) -> None:
        """Ends the connection, in order."""
        self._orderly = True
        if self._transport is not None:
            self._transport.abort()
            await self._gone

    # ------------------------------------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's isn't one by its class

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._heard(message)
        except ValueError as error:
            log.warning("shim.connection", error=str(error))
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            log.warning("shim.connection", error=str(error))
        self.closed = True
        for waiting in (self._greeted, self._gone):
            if not waiting.done():
                waiting.set_result(None)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Unavailable("the shim is gone"))
        self._owner.lost(self, self._orderly)

    def _heard(self, message: dict[str, Any]) -> None:
        match message.get("event"):
            case "hello":
                self.hello = message
                if not self._greeted.done():
                    self._greeted.set_result(None)
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


def open_socket(directory: str, name: str) -> socket.socket:
    """A connection to the socket `name` in `directory`, which doesn't block. OSError when nobody listens there."""
    connection = socket.socket(fileno=protocol.connect(directory, name).detach())
    connection.setblocking(False)
    return connection
