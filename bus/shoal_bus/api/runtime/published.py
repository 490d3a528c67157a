"""Events that clients publish, of any topic and payload: they go through the runtime's outbox, beside its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from shoal_bus.errors import InvalidArgument
from shoal_bus.events import Topic
from shoal_bus.identifiers import check_identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.verb import Verb, behaves


def check_topic(topic: str) -> str:
    """`topic` itself, or INVALID_ARGUMENT: identifiers, each behind a `/`, as `/tasks/exit`.

    >>> check_topic("/tenant/Disk.full")
    '/tenant/Disk.full'
    """
    if not topic:
        raise InvalidArgument("a topic must not be empty")
    if not topic.startswith("/"):
        raise InvalidArgument(f"topic {topic!r}: must start with '/'")
    if topic == "/":
        raise InvalidArgument("topic '/': must have at least one component")
    for component in topic[1:].split("/"):
        check_identifier(component, f"topic {topic!r}: component")
    return topic


def _validated(topic: str) -> str:
    try:
        return check_topic(topic)
    except InvalidArgument as error:
        raise ValueError(error.message) from None


class PublishEvent(Request):
    """An event as its publisher has it. `value` is a message of the type `type_url` names, and is never looked into.

    `seconds` and `nanos` since 1970 say when it happened, as in protobuf's Timestamp; without seconds it is now.
    """

    topic: Annotated[str, AfterValidator(_validated)]
    type_url: str = ""
    value: bytes = b""
    seconds: int | None = Field(default=None, ge=-62_135_596_800, le=253_402_300_799)
    nanos: int = Field(default=0, ge=0, le=999_999_999)


class EventPublished(Message):
    """Payload of `/events/published`: a client's event, whose own topic subscribers of containerd's API see.

    Clients' topics have a topic of shoal's for themselves, so that none can pass for an event of a service.
    """

    topic: str
    type_url: str = ""
    value: bytes = b""
    seconds: int
    nanos: int


EVENT_PUBLISH = Verb(
    "runtime",
    "event",
    "publish",
    PublishEvent,
    Empty,
    mutates=True,
    behaviour=behaves("Puts a client's event into the stream of events; answered once it is committed."),
)

EVENTS_PUBLISHED = Topic("runtime", "/events/published", EventPublished, "topic")
