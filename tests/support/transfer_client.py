"""A client of the transfer service as containerd 2's is one: streams first, and a call that names them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from shoal_gateway.proto.containerd.services.streaming.v1.streaming_pb2 import StreamInit
from shoal_gateway.proto.containerd.services.transfer.v1.transfer_pb2 import TransferRequest
from shoal_gateway.proto.containerd.types.transfer.progress_pb2 import Progress
from shoal_gateway.proto.containerd.types.transfer.registry_pb2 import AuthRequest, AuthResponse
from shoal_gateway.proto.containerd.types.transfer.streaming_pb2 import Data, WindowUpdate

TRANSFER = "/containerd.services.transfer.v1.Transfer/Transfer"
STREAM = "/containerd.services.streaming.v1.Streaming/Stream"
WINDOW, LARGEST, EVERYTHING = 64 << 10, 32 << 10, 1 << 30


def packed(message: Message) -> Any:
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


class OpenStream:
    """A stream that the server has said it knows of."""

    def __init__(self, name: str, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        self.name, self.call = name, call

    async def send(self, message: Message) -> None:
        await self.call.write(packed(message))

    async def receive(self) -> Any | None:
        """The next message; None at the stream's end."""
        read = await self.call.read()
        return None if read is grpc.aio.EOF else read

    async def receive_bytes(self) -> bytes:
        """All that comes as Data: first within a small window, and then within one that is large enough for all.

        (A further one, sent while the server ends the stream, would be an error of grpc.aio's, not of the server's.)
        """
        await self.send(WindowUpdate(update=WINDOW))
        window, found = WINDOW, bytearray()
        while (message := await self.receive()) is not None:
            data = Data.FromString(message.value).data
            assert 0 < len(data) <= LARGEST
            window -= len(data)
            assert window >= 0, "more than was allowed"
            found += data
            if not window:
                await self.send(WindowUpdate(update=EVERYTHING))
                window = EVERYTHING
        return bytes(found)

    async def send_bytes(self, data: bytes) -> None:
        """All of `data`, as the server allows it, and the end."""
        allowed = 0
        while data:
            while allowed <= 0:
                message = await self.receive()
                if message is None:
                    return  # it has had enough
                allowed += WindowUpdate.FromString(message.value).update
            size = min(LARGEST, allowed, len(data))
            try:
                await self.send(Data(data=data[:size]))
            except grpc.aio.AioRpcError:
                return  # it has had enough meanwhile
            data, allowed = data[size:], allowed - size
        await self.call.done_writing()


class TransferClient:
    """One namespace's."""

    def __init__(self, channel: grpc.aio.Channel, namespace: str = "default") -> None:
        self.channel, self.metadata = channel, (("containerd-namespace", namespace),)
        self._count = 0

    @asynccontextmanager
    async def stream(self, name: str = "") -> AsyncIterator[OpenStream]:
        """An open stream; cancelled at the block's end."""
        self._count += 1
        name = name or f"stream-{self._count}"
        call = self.channel.stream_stream(
            STREAM, request_serializer=Any.SerializeToString, response_deserializer=Any.FromString
        )(metadata=self.metadata)
        try:
            await call.write(packed(StreamInit(id=name)))
            first = await call.read()
            assert first is not grpc.aio.EOF, await call.details()
            assert first.type_url == "google.protobuf.Empty"
            yield OpenStream(name, call)
        finally:
            call.cancel()

    async def transfer(self, source: Message, destination: Message, *, progress: str = "") -> None:
        """Returns when it is done."""
        request = TransferRequest(source=packed(source), destination=packed(destination))
        if progress:
            request.options.progress_stream = progress
        await self.channel.unary_unary(TRANSFER)(request.SerializeToString(), metadata=self.metadata, timeout=60)

    async def told(self, source: Message, destination: Message) -> list[Progress]:
        """The progress of a whole transfer."""
        async with self.stream() as stream:
            collecting = asyncio.ensure_future(self._collect(stream))
            await self.transfer(source, destination, progress=stream.name)
            return await asyncio.wait_for(collecting, 20)

    @staticmethod
    async def _collect(stream: OpenStream) -> list[Progress]:
        found = []
        while (message := await stream.receive()) is not None:
            assert message.type_url == "containerd.types.transfer.Progress"
            found.append(Progress.FromString(message.value))
        return found

    @staticmethod
    async def answer(stream: OpenStream, answer: AuthResponse, asked: list[AuthRequest]) -> None:
        """Answers every question on a stream, and writes down what was asked."""
        while (message := await stream.receive()) is not None:
            asked.append(AuthRequest.FromString(message.value))
            await stream.send(answer)
