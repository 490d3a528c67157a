"""containerd.services.events.v1.Events: the event stream, in containerd's envelopes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from google.protobuf.empty_pb2 import Empty
from shoal_bus.errors import Unimplemented
from shoal_bus.filters import compile_filters

from shoal_gateway.call import Call
from shoal_gateway.live import LiveEvents
from shoal_gateway.metrics import Metrics
from shoal_gateway.proto.containerd.services.events.v1 import events_pb2 as pb
from shoal_gateway.rpc import Servicer


class Events(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Events"]

    def __init__(self, live: LiveEvents, metrics: Metrics) -> None:
        self._live, self._metrics = live, metrics

    async def subscribe(self, call: Call, request: pb.SubscribeRequest) -> AsyncGenerator[bytes, None]:
        """Every namespace's events of this node from now on; one passes when any of the filters matches it."""
        matches = compile_filters(list(request.filters))
        with self._metrics.subscribers.track_inprogress():
            async with aclosing(self._live.subscribe(lambda event: matches(event.field))) as events:
                async for event in events:
                    yield event.data
                    self._metrics.forwarded.inc()

    async def publish(self, call: Call, request: pb.PublishRequest) -> Empty:
        raise Unimplemented("events can't be published through the gateway yet")

    async def forward(self, call: Call, request: pb.ForwardRequest) -> Empty:
        raise Unimplemented("events can't be forwarded through the gateway yet")
