"""Binds a gRPC service to a class: methods by their descriptors, every exception a status, every call counted.

    class Version(Servicer):
        service = version_pb2.DESCRIPTOR.services_by_name["Version"]

        async def version(self, call: Call, request: Empty) -> VersionResponse: ...

A method `PluginInfo` is served by `plugin_info`; one that streams its replies is an asynchronous generator, and gets an
asynchronous iterator where requests stream, too. What the class hasn't got is UNIMPLEMENTED. There are no generated
servicers and no interceptors: parsing belongs here, since gRPC would answer UNKNOWN for what it can't parse, and each
layer less is time on every call.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from shoal_bus.client import Client
from shoal_bus.errors import Internal, ShoalError

from shoal_gateway.call import Call
from shoal_gateway.errors import status_of
from shoal_gateway.metrics import Metrics


class Servicer:
    """One gRPC service: thin, without state of its own."""

    service: ClassVar[ServiceDescriptor]


def bind(servicer: Servicer, client: Client, metrics: Metrics) -> grpc.GenericRpcHandler[bytes, bytes]:
    """The handler that serves `servicer` on a `grpc.aio` server."""
    handlers = {binding.name: binding.handler() for binding in bindings(servicer, client, metrics)}
    return grpc.method_handlers_generic_handler(servicer.service.full_name, handlers)


def bindings(servicer: Servicer, client: Client, metrics: Metrics) -> Iterator[Binding]:
    """The methods that `servicer` has."""
    for method in servicer.service.methods:
        implementation = getattr(servicer, snake(method.name), None)
        if implementation is not None:
            yield Binding(method, implementation, client, metrics)


def snake(name: str) -> str:
    """A method's name in Python: `PluginInfo` is `plugin_info`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class _Gone(Exception):
    """The client isn't there any more: there is nobody to tell anything."""


async def _write(context: Any, data: bytes) -> None:
    try:
        await context.write(data)
    except grpc.aio.InternalError:  # what grpc raises where the connection has been closed meanwhile
        raise _Gone from None


class Binding:
    """One method, bound to what implements it."""

    def __init__(self, method: MethodDescriptor, implementation: Any, client: Client, metrics: Metrics) -> None:
        assert method.containing_service is not None
        self.name = method.name
        self.streams = method.client_streaming, method.server_streaming
        """Whether it streams its requests, and its replies."""
        self._path = f"/{method.containing_service.full_name}/{method.name}"
        self._request: type[Message] = GetMessageClass(method.input_type)
        self._implementation = implementation
        self._client = client
        self._calls = metrics.calls(method.containing_service.full_name, method.name)

    def handler(self) -> Any:
        """What gRPC is to call."""
        match self.streams:
            case False, False:
                return grpc.unary_unary_rpc_method_handler(self.unary)
            case False, True:
                return grpc.unary_stream_rpc_method_handler(self.stream)
            case True, True:
                return grpc.stream_stream_rpc_method_handler(self.both)
        raise NotImplementedError(f"{self._path}: the protocol has no such methods")

    def call(self, metadata: Sequence[tuple[str, Any]], remaining: float | None) -> Call:
        """A call of it, by a client that still waits for so many seconds (None: it doesn't say)."""
        return Call.of(self._path, metadata, remaining, self._client)

    async def answer(self, call: Call, data: bytes) -> tuple[grpc.StatusCode, bytes | str]:
        """A unary call's reply, or, where it failed, what its client is told."""
        implementation: Callable[[Call, Message], Awaitable[Message]] = self._implementation
        with self._calls.counted() as outcome:
            try:
                return grpc.StatusCode.OK, (await implementation(call, self._parse(data))).SerializeToString()
            except Exception as error:  # noqa: BLE001 (every exception is told, as a status)
                outcome.code, message = self._refused(call, error)
                return outcome.code, message

    async def unary(self, data: bytes, context: Any) -> bytes:
        code, told = await self.answer(self._called(context), data)
        if isinstance(told, bytes):
            return told
        await context.abort(code, told)
        raise AssertionError("abort raises")

    async def stream(self, data: bytes, context: Any) -> None:
        await self._stream(context, lambda call: self._implementation(call, self._parse(data)))

    async def both(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async def parsed() -> AsyncGenerator[Message, None]:
            async for data in requests:
                yield self._parse(data)

        await self._stream(context, lambda call: self._implementation(call, parsed()))

    async def _stream(self, context: Any, begin: Callable[[Call], AsyncGenerator[Message | bytes, None]]) -> None:
        call = self._called(context)
        with self._calls.counted() as outcome:
            try:
                async with aclosing(begin(call)) as items:
                    async for item in items:
                        # Writing waits for a client that is slow, and so does the generator.
                        await _write(context, item if isinstance(item, bytes) else item.SerializeToString())
                return
            except _Gone:
                outcome.code = grpc.StatusCode.CANCELLED
                return
            except Exception as error:  # noqa: BLE001 (every exception is told, as a status)
                outcome.code, message = self._refused(call, error)
            await context.abort(outcome.code, message)

    def _parse(self, data: bytes) -> Message:
        try:
            return self._request.FromString(data)
        except DecodeError:
            # The code and the words of grpc-go, which containerd's clients know.
            raise Internal(f"grpc: error unmarshalling request: not a {self._request.DESCRIPTOR.full_name}") from None

    def _called(self, context: Any) -> Call:
        return self.call(context.invocation_metadata() or (), context.time_remaining())

    def _refused(self, call: Call, error: Exception) -> tuple[grpc.StatusCode, str]:
        code, message = status_of(error)
        if code is grpc.StatusCode.INTERNAL and not isinstance(error, ShoalError):
            call.log.error("call.failed", error=message, exc_info=error)
        else:
            call.log.info("call.refused", code=code.name, error=message)
        return code, message
