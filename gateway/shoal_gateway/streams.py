"""Streams of the streaming service: a client opens one under a name, and a transfer that is told the name uses it.

A stream lives as long as the call that opened it, and only the copy of the gateway that has that call knows of it: a
client's calls come by one connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager

from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.message import Message
from shoal_bus.errors import AlreadyExists, Cancelled, InvalidArgument, NotFound

from shoal_gateway.proto.containerd.types.transfer.streaming_pb2 import Data, WindowUpdate
from shoal_gateway.typeurls import message_of, packed

WINDOW = 64 << 10
"""Bytes that a sender may send before it hears of the receiver again, as containerd allows them."""
LARGEST_DATA = 32 << 10
_AHEAD = 8
"""Messages of a client's that are kept for who reads them."""
_CANCEL_SECONDS = 0.05
"""A call that is cancelled looks like one whose client sends no more, until gRPC cancels its handler a moment later."""
_UNTOLD = 1024
"""Messages kept for a client that doesn't read; of progress, what comes on top is left out."""


class Stream:
    """Messages both ways between a client and a transfer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._incoming: asyncio.Queue[AnyProto | Exception | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_AHEAD)
        self._outgoing: asyncio.Queue[AnyProto | None] = asyncio.Queue()
        self._gone = False

    def send(self, message: Message) -> None:
        """Sends a message. CANCELLED when the client has gone."""
        if self._gone:
            raise self._has_gone()
        self._outgoing.put_nowait(packed(message))

    def tell(self, message: Message) -> None:
        """Sends what may be missed: nothing happens where nobody reads it."""
        if not self._gone and self._outgoing.qsize() < _UNTOLD:
            self._outgoing.put_nowait(packed(message))

    async def receive(self) -> AnyProto | None:
        """The client's next message; None when it sends no more. CANCELLED when it has gone without saying so."""
        received = await self._incoming.get()
        if received is None or isinstance(received, Exception):
            self._incoming.put_nowait(received)  # for whoever asks again
            if received is not None:
                raise received
            return None
        self._room.release()
        return received

    def close(self) -> None:
        """Ends the stream, behind what has been sent."""
        self._outgoing.put_nowait(None)

    async def serve(self, requests: AsyncIterator[AnyProto]) -> AsyncGenerator[AnyProto, None]:
        """What goes to the client, until the stream is closed; what comes from it is kept meanwhile."""
        reading = asyncio.create_task(self._read(requests), name=f"stream {self.name}")
        try:
            while (message := await self._outgoing.get()) is not None:
                yield message
        finally:
            self._gone = True
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            self._incoming.put_nowait(self._has_gone())

    async def _read(self, requests: AsyncIterator[AnyProto]) -> None:
        try:
            async for request in requests:
                await self._room.acquire()
                self._incoming.put_nowait(request)
        except Exception as error:  # noqa: BLE001 (told to who reads the stream)
            self._incoming.put_nowait(error)
        else:
            await asyncio.sleep(_CANCEL_SECONDS)
            self._incoming.put_nowait(None)

    def _has_gone(self) -> Cancelled:
        return Cancelled(f"stream {self.name}: its client has gone")


class Streams:
    """The streams that are open, by namespace and name."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], Stream] = {}

    @contextmanager
    def opened(self, namespace: str, name: str) -> Iterator[Stream]:
        """A new stream while the block lasts. ALREADY_EXISTS, INVALID_ARGUMENT for an empty name."""
        if not name:
            raise InvalidArgument("a stream must have an id")
        if (namespace, name) in self._open:
            raise AlreadyExists(f"stream {name[:128]!r}: already exists")
        stream = self._open[namespace, name] = Stream(name)
        try:
            yield stream
        finally:
            del self._open[namespace, name]

    def get(self, namespace: str, name: str) -> Stream:
        """NOT_FOUND for one that isn't open, or not at this copy of the gateway."""
        stream = self._open.get((namespace, name))
        if stream is None:
            raise NotFound(f"stream {name[:128]!r}: not found")
        return stream


async def received(stream: Stream) -> AsyncGenerator[bytes, None]:
    """The bytes that a client sends as `Data`, within the window it is given, to their end."""
    window = 0
    while True:
        if window < WINDOW:
            stream.send(WindowUpdate(update=WINDOW))
            window += WINDOW
        message = await stream.receive()
        if message is None:
            return
        data = message_of(message, Data, f"stream {stream.name}").data
        window -= len(data)
        yield data


class Sender:
    """Sends bytes to a client as `Data`, no more than it has allowed."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._allowed = stream, 0

    async def write(self, data: bytes) -> None:
        """CANCELLED when the client takes no more. INVALID_ARGUMENT for a window that can't be one."""
        view = memoryview(data)
        while view:
            while self._allowed <= 0:
                message = await self._stream.receive()
                if message is None:
                    raise Cancelled(f"stream {self._stream.name}: its client takes no more")
                update = message_of(message, WindowUpdate, f"stream {self._stream.name}").update
                if update <= 0:
                    raise InvalidArgument(f"stream {self._stream.name}: a window of {update} bytes")
                self._allowed += update
            size = min(LARGEST_DATA, self._allowed, len(view))
            self._stream.send(Data(data=bytes(view[:size])))
            self._allowed -= size
            view = view[size:]
