"""The bus's events as containerd's envelopes: each topic's payload is the protobuf message that clients know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct
from shoal_bus.api.runtime import EVENTS_PUBLISHED, EventPublished
from shoal_bus.consumer import Received
from shoal_bus.events import Event

from shoal_gateway.proto.containerd.events import (
    container_pb2,
    content_pb2,
    image_pb2,
    namespace_pb2,
    sandbox_pb2,
    snapshot_pb2,
    task_pb2,
)
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope

PAYLOADS: dict[str, type[Message]] = {
    "/containers/create": container_pb2.ContainerCreate,
    "/containers/update": container_pb2.ContainerUpdate,
    "/containers/delete": container_pb2.ContainerDelete,
    "/content/create": content_pb2.ContentCreate,
    "/content/delete": content_pb2.ContentDelete,
    "/images/create": image_pb2.ImageCreate,
    "/images/update": image_pb2.ImageUpdate,
    "/images/delete": image_pb2.ImageDelete,
    "/namespaces/create": namespace_pb2.NamespaceCreate,
    "/namespaces/update": namespace_pb2.NamespaceUpdate,
    "/namespaces/delete": namespace_pb2.NamespaceDelete,
    "/sandboxes/create": sandbox_pb2.SandboxCreate,
    "/sandboxes/start": sandbox_pb2.SandboxStart,
    "/sandboxes/exit": sandbox_pb2.SandboxExit,
    "/snapshot/prepare": snapshot_pb2.SnapshotPrepare,
    "/snapshot/commit": snapshot_pb2.SnapshotCommit,
    "/snapshot/remove": snapshot_pb2.SnapshotRemove,
    "/tasks/create": task_pb2.TaskCreate,
    "/tasks/start": task_pb2.TaskStart,
    "/tasks/exit": task_pb2.TaskExit,
    "/tasks/delete": task_pb2.TaskDelete,
    "/tasks/oom": task_pb2.TaskOOM,
    "/tasks/exec-added": task_pb2.TaskExecAdded,
    "/tasks/exec-started": task_pb2.TaskExecStarted,
    "/tasks/paused": task_pb2.TaskPaused,
    "/tasks/resumed": task_pb2.TaskResumed,
    "/tasks/checkpointed": task_pb2.TaskCheckpointed,
}
"""The message of each of containerd's topics. An event of another topic (the network's own) is a `Struct`."""


@dataclass(frozen=True)
class Forwarded:
    """An event on its way to subscribers: turned into an envelope once, whoever many they are."""

    event: Event
    sequence: int

    @property
    def namespace(self) -> str:
        """The event's namespace. What happens to a namespace is told in that namespace, as containerd does."""
        if self.event.topic.startswith("/namespaces/"):
            return str(self.event.payload.get("name", ""))
        return self.event.namespace if self.event.namespace != "_" else ""

    @cached_property
    def published(self) -> EventPublished | None:
        """What a client has published, if the event is one of those."""
        return EventPublished.of(self.event.payload) if self.event.topic == EVENTS_PUBLISHED.name else None

    @property
    def topic(self) -> str:
        """As subscribers see it."""
        return self.published.topic if self.published is not None else self.event.topic

    @cached_property
    def payload(self) -> Message | None:
        """The topic's own message; None for a client's, where its type isn't known here or it can't be read as that."""
        if self.published is not None:
            return unpacked(self.published.type_url, self.published.value)
        return payload_of(self.event.topic, self.event.payload)

    @cached_property
    def data(self) -> bytes:
        """The envelope's bytes. A client's event is in it byte for byte as it was published."""
        envelope = Envelope(namespace=self.namespace, topic=self.topic)
        if self.published is not None:
            envelope.timestamp.seconds, envelope.timestamp.nanos = self.published.seconds, self.published.nanos
            envelope.event.type_url, envelope.event.value = self.published.type_url, self.published.value
            return envelope.SerializeToString()
        assert self.payload is not None
        envelope.timestamp.FromDatetime(self.event.timestamp)
        envelope.event.CopyFrom(
            AnyMessage(type_url=self.payload.DESCRIPTOR.full_name, value=self.payload.SerializeToString())
        )
        return envelope.SerializeToString()

    def field(self, path: Sequence[str]) -> str | None:
        """What containerd's filter language sees: `topic`, `namespace`, and `event.<field>` of the payload."""
        match path:
            case ["topic"]:
                return self.topic or None
            case ["namespace"]:
                return self.namespace or None
            case ["event", *rest] if rest:
                return field_of(self.payload, rest) if self.payload is not None else None
            case _:
                return None


def forwarded(received: Received) -> Forwarded:
    """An event from the stream, to be sent to subscribers."""
    return Forwarded(received.event, received.sequence)


def payload_of(topic: str, payload: dict[str, Any]) -> Message:
    """A payload as its topic's message. Fields that the message hasn't got are left out."""
    kind = PAYLOADS.get(topic, Struct)
    if topic == "/containers/create":
        return _created(payload)
    return ParseDict(_json(payload), kind(), ignore_unknown_fields=kind is not Struct)


def unpacked(type_url: str, value: bytes) -> Message | None:
    """The message that an Any holds; None where its type isn't one of containerd's, or `value` isn't of that type."""
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(type_url.rpartition("/")[2])
        return GetMessageClass(descriptor).FromString(value)
    except (KeyError, DecodeError):
        return None


def _created(payload: dict[str, Any]) -> container_pb2.ContainerCreate:
    """The one payload with an Any in it, which protobuf's JSON has only for types that it knows."""
    runtime = payload.get("runtime") or {}
    told = container_pb2.ContainerCreate(id=payload.get("id", ""), image=payload.get("image", ""))
    told.runtime.name = runtime.get("name", "")
    options = runtime.get("options") or {}
    if options.get("type_url") or options.get("value"):
        told.runtime.options.type_url, told.runtime.options.value = options["type_url"], options["value"]
    return told


def field_of(message: Message, path: Sequence[str]) -> str | None:
    """A field's text as containerd's filters see it: text, true booleans and map entries; None where it is empty."""
    if isinstance(message, Struct):
        value = message.fields.get(path[0]) if len(path) == 1 else None
        return (value.string_value or None) if value is not None else None
    descriptor = message.DESCRIPTOR.fields_by_name.get(path[0])
    if descriptor is None:
        return None
    value, rest = getattr(message, path[0]), path[1:]
    if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
        return value.get(".".join(rest)) if rest else None
    if descriptor.is_repeated:
        return None
    if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        return field_of(value, rest) if rest and message.HasField(path[0]) else None
    if descriptor.type == FieldDescriptor.TYPE_STRING:
        return value or None
    return "true" if value is True else None


def _json(value: Any) -> Any:
    """A msgpack value as protobuf's JSON mapping has it."""
    match value:
        case dict():
            return {str(key): _json(one) for key, one in value.items()}
        case list():
            return [_json(one) for one in value]
        case datetime():
            return value.isoformat().replace("+00:00", "Z")
        case bytes():
            return value.hex()
        case _:
            return value
