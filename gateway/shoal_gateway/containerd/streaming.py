"""containerd.services.streaming.v1.Streaming: the streams that transfers are told of."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.empty_pb2 import Empty
from shoal_bus.errors import InvalidArgument

from shoal_gateway.call import Call
from shoal_gateway.proto.containerd.services.streaming.v1 import streaming_pb2 as pb
from shoal_gateway.rpc import Servicer
from shoal_gateway.streams import Streams
from shoal_gateway.typeurls import message_of, packed


class Streaming(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Streaming"]

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def stream(self, call: Call, requests: AsyncIterator[AnyProto]) -> AsyncGenerator[AnyProto, None]:
        """The first message names the stream; the first answer says that it may be used."""
        namespace = call.namespace
        async for first in requests:
            name = message_of(first, pb.StreamInit, "the first message").id
            break
        else:
            raise InvalidArgument("a stream begins with a StreamInit")
        with self._streams.opened(namespace, name) as stream:
            yield packed(Empty())
            async with aclosing(stream.serve(requests)) as messages:
                async for message in messages:
                    yield message
