"""ttrpc: unary calls without HTTP/2, as containerd's shims and plugins make them, on a Unix socket beside gRPC's.

A frame is a header of ten bytes (the length of what follows and the number of a stream, 32 bits each, big-endian; a
type and flags, a byte each) and a message. A client numbers its requests oddly and upwards, and has each answered by
its number, in any order (https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError
from shoal_bus.client import Client
from shoal_bus.errors import Code

from shoal_gateway.call import NAMESPACE_HEADER
from shoal_gateway.listener import Listener
from shoal_gateway.metrics import Metrics
from shoal_gateway.proto.ttrpc.request_pb2 import Request, Response
from shoal_gateway.rpc import Binding, Servicer, bindings

log = structlog.get_logger(__name__)

LARGEST = 4 << 20
"""What ttrpc's own implementations take, in bytes."""
AT_ONCE = 128
"""How many requests of one connection are under way before the next is read."""
DRAIN_SECONDS = 3.0
REQUEST, RESPONSE, DATA = 1, 2, 3
_HEADER = struct.Struct(">IIBB")
_HEADERS = {f"{NAMESPACE_HEADER}-ttrpc": NAMESPACE_HEADER}
"""What ttrpc's clients call differently from gRPC's."""


@asynccontextmanager
async def serving_ttrpc(
    path: Path, services: Sequence[Servicer], client: Client, metrics: Metrics, *, owner: tuple[int, int] = (0, 0)
) -> AsyncIterator[None]:
    """Serves the unary methods of `services` on the Unix socket at `path` for a block; calls may finish after it."""
    methods = {
        (service.service.full_name, binding.name): binding
        for service in services
        for binding in bindings(service, client, metrics)
        if not any(binding.streams)
    }
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await _Connection(reader, writer, methods).run()
        finally:
            connections.discard(task)

    listener = Listener(path, owner)
    with listener.binding():
        server = await asyncio.start_unix_server(connected, listener.own)
    try:
        async with listener.published():
            yield
    finally:
        server.close()
        for task in connections:
            task.cancel()
        if connections:
            await asyncio.wait(connections, timeout=DRAIN_SECONDS + 1)


class _Connection:
    """One client."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, methods: dict[tuple[str, str], Binding]
    ) -> None:
        self._reader, self._writer, self._methods = reader, writer, methods
        self._room = asyncio.Semaphore(AT_ONCE)
        self._calls: set[asyncio.Task[None]] = set()
        self._last = 0

    async def run(self) -> None:
        """Until the client goes away, which cancels its calls, or the server ends, which lets them finish."""
        try:
            while True:
                await self._frame()
        except (asyncio.IncompleteReadError, ConnectionError):
            for call in self._calls:
                call.cancel()
        finally:
            if self._calls:
                _, late = await asyncio.wait(self._calls, timeout=DRAIN_SECONDS)
                for call in late:
                    call.cancel()
            self._writer.close()

    async def _frame(self) -> None:
        length, stream, kind, _ = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
        if length > LARGEST:
            await self._skip(length)
            code, message = Code.RESOURCE_EXHAUSTED, f"message length {length} exceeds {LARGEST}"
            return await self._answer(stream, code, message)
        data = await self._reader.readexactly(length)
        if stream % 2 != 1:
            return await self._answer(stream, Code.INVALID_ARGUMENT, "StreamID must be odd for clients")
        if kind == DATA:
            return await self._answer(stream, Code.INVALID_ARGUMENT, "StreamID is of no stream")
        if kind != REQUEST:
            return None  # of a later version of the protocol
        if stream <= self._last:
            return await self._answer(stream, Code.INVALID_ARGUMENT, "StreamID must be higher than before")
        self._last = stream
        try:
            request = Request.FromString(data)
        except DecodeError:
            return await self._answer(stream, Code.INVALID_ARGUMENT, "not a ttrpc.Request")
        await self._room.acquire()
        task = asyncio.create_task(self._call(stream, request), name="ttrpc call")
        self._calls.add(task)
        task.add_done_callback(self._ended)
        return None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._room.release()

    async def _call(self, stream: int, request: Request) -> None:
        binding = self._methods.get((request.service, request.method))
        if binding is None:
            message = f"/{request.service}/{request.method}: no such method on this socket"
            return await self._answer(stream, Code.UNIMPLEMENTED, message)
        metadata = {_HEADERS.get(key := one.key.lower(), key): one.value for one in reversed(request.metadata)}
        remaining = request.timeout_nano / 1e9 if request.timeout_nano > 0 else None
        code, told = await binding.answer(binding.call(metadata, remaining), request.payload)
        return await self._answer(stream, code, told)

    async def _answer(self, stream: int, code: Code, told: bytes | str) -> None:
        response = Response()
        if isinstance(told, bytes):
            response.payload = told
        else:
            response.status.code, response.status.message = int(code), told
        data = response.SerializeToString()
        try:
            self._writer.write(_HEADER.pack(len(data), stream, RESPONSE, 0) + data)
            await self._writer.drain()
        except ConnectionError:
            return  # who asked has gone

    async def _skip(self, length: int) -> None:
        while length:
            length -= len(await self._reader.readexactly(min(length, 1 << 16)))
