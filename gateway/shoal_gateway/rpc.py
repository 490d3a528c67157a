"""Binds a gRPC service to a class: methods by their descriptors, every exception a status, every call counted.

    class Version(Servicer):
        service = version_pb2.DESCRIPTOR.services_by_name["Version"]

        async def version(self, call: Call, request: Empty) -> VersionResponse: ...

A method `PluginInfo` is served by `plugin_info`; one that streams its replies is an asynchronous generator, and gets an
asynchronous iterator where requests stream, too. What the class hasn't got is UNIMPLEMENTED. There are no generated
servicers and no interceptors: each layer less is time on every call.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any, ClassVar

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from shoal_bus.client import Client
from shoal_bus.errors import Code, Internal, ShoalError

from shoal_gateway.call import Call
from shoal_gateway.errors import status_of
from shoal_gateway.http2.stream import Stream
from shoal_gateway.metrics import Metrics


class Servicer:
    """One gRPC service: thin, without state of its own."""

    service: ClassVar[ServiceDescriptor]


def bind(servicer: Servicer, client: Client, metrics: Metrics) -> dict[str, Binding]:
    """What serves the methods of `servicer` on HTTP/2, by their paths."""
    return {binding.path: binding for binding in bindings(servicer, client, metrics)}


def bindings(servicer: Servicer, client: Client, metrics: Metrics) -> Iterator[Binding]:
    """The methods that `servicer` has."""
    for method in servicer.service.methods:
        implementation = getattr(servicer, snake(method.name), None)
        if implementation is not None:
            yield Binding(method, implementation, client, metrics)


def snake(name: str) -> str:
    """A method's name in Python: `PluginInfo` is `plugin_info`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class Binding:
    """One method, bound to what implements it."""

    def __init__(self, method: MethodDescriptor, implementation: Any, client: Client, metrics: Metrics) -> None:
        assert method.containing_service is not None
        self.name = method.name
        self.streams = method.client_streaming, method.server_streaming
        """Whether it streams its requests, and its replies."""
        self.takes_many = method.client_streaming
        self.path = f"/{method.containing_service.full_name}/{method.name}"
        if self.streams == (True, False):
            raise NotImplementedError(f"{self.path}: the protocol has no such methods")
        self._request: type[Message] = GetMessageClass(method.input_type)
        self._implementation = implementation
        self._client = client
        self._calls = metrics.calls(method.containing_service.full_name, method.name)

    def call(self, metadata: dict[str, str], remaining: float | None) -> Call:
        """A call of it, by a client that still waits for so many seconds (None: it doesn't say)."""
        return Call.of(self.path, metadata, remaining, self._client)

    async def answer(self, call: Call, data: bytes) -> tuple[Code, bytes | str]:
        """A unary call's reply, or, where it failed, what its client is told."""
        implementation: Callable[[Call, Message], Awaitable[Message]] = self._implementation
        with self._calls.counted() as outcome:
            try:
                return Code.OK, (await implementation(call, self._parse(data))).SerializeToString()
            except Exception as error:  # noqa: BLE001 (every exception is told, as a status)
                outcome.code, message = self._refused(call, error)
                return outcome.code, message

    async def serve(self, stream: Stream) -> None:
        """Answers one call on HTTP/2."""
        call = self.call(stream.metadata, stream.time_remaining())
        if self.streams == (False, False):
            code, told = await self.answer(call, stream.only())
            if isinstance(told, bytes):
                await stream.respond(told)
            else:
                stream.refuse(code, told)
            return
        with self._calls.counted() as outcome:
            try:
                await self._several(call, stream)
            except Exception as error:  # noqa: BLE001 (every exception is told, as a status)
                outcome.code, message = self._refused(call, error)
                stream.refuse(outcome.code, message)

    async def _several(self, call: Call, stream: Stream) -> None:
        async def parsed() -> AsyncGenerator[Message, None]:
            async for data in stream.messages():
                yield self._parse(data)

        asked = parsed() if self.takes_many else self._parse(stream.only())
        items: AsyncGenerator[Message | bytes, None] = self._implementation(call, asked)
        async with aclosing(items):
            async for item in items:
                # Writing waits for a client that is slow, and so does the generator.
                await stream.write(item if isinstance(item, bytes) else item.SerializeToString())
        stream.end()

    def _parse(self, data: bytes) -> Message:
        try:
            return self._request.FromString(data)
        except DecodeError:
            # The code and the words of grpc-go, which containerd's clients know.
            raise Internal(f"grpc: error unmarshalling request: not a {self._request.DESCRIPTOR.full_name}") from None

    def _refused(self, call: Call, error: Exception) -> tuple[Code, str]:
        code, message = status_of(error)
        if code is Code.INTERNAL and not isinstance(error, ShoalError):
            call.log.error("call.failed", error=message, exc_info=error)
        else:
            call.log.info("call.refused", code=code.name, error=message)
        return code, message
