"""containerd.services.events.v1.Events: the event stream, in containerd's envelopes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from shoal_bus.api import runtime
from shoal_bus.api.runtime import check_topic
from shoal_bus.errors import InvalidArgument
from shoal_bus.filters import compile_filters
from shoal_bus.identifiers import check_identifier

from shoal_gateway.call import Call
from shoal_gateway.live import LiveEvents
from shoal_gateway.metrics import Metrics
from shoal_gateway.proto.containerd.services.events.ttrpc.v1 import events_pb2 as ttrpc_pb
from shoal_gateway.proto.containerd.services.events.v1 import events_pb2 as pb
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope
from shoal_gateway.rpc import Servicer

_ZERO_TIME = -62_135_596_800
"""Seconds from 1970 to Go's zero time."""


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
        """An event of the caller's namespace, as of now. Returns once it is committed."""
        call.namespace  # noqa: B018 (one that is missing comes before what is wrong with the topic)
        await _publish(call, request.topic, request.event)
        return Empty()

    async def forward(self, call: Call, request: pb.ForwardRequest) -> Empty:
        """Another publisher's event: of its own namespace, and of when it happened there."""
        return await _forward(call, request.envelope)


class ForwardedEvents(Servicer):
    """containerd.services.events.ttrpc.v1.Events: what is left of it where calls are unary and nameless."""

    service = ttrpc_pb.DESCRIPTOR.services_by_name["Events"]

    async def forward(self, call: Call, request: ttrpc_pb.ForwardRequest) -> Empty:
        """Another publisher's event, as above."""
        return await _forward(call, request.envelope)


async def _forward(call: Call, envelope: Envelope) -> Empty:
    check_identifier(envelope.namespace, "event envelope: namespace")
    check_topic(envelope.topic)
    at = envelope.timestamp
    if not envelope.HasField("timestamp") or (at.seconds, at.nanos) == (_ZERO_TIME, 0):
        raise InvalidArgument("timestamp must be set on forwarded event")
    await _publish(call, envelope.topic, envelope.event, at=at, namespace=envelope.namespace)
    return Empty()


async def _publish(
    call: Call, topic: str, event: AnyMessage, *, at: Timestamp | None = None, namespace: str = ""
) -> None:
    asked = runtime.PublishEvent(topic=check_topic(topic), type_url=event.type_url, value=event.value)
    if at is not None:
        when = {"seconds": at.seconds, "nanos": at.nanos}
        asked = runtime.PublishEvent.of({**asked.model_dump(exclude_none=True), **when})
    await call.ask(runtime.EVENT_PUBLISH, asked, namespace=namespace)
