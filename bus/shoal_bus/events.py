"""Events: what is written into the outbox and read from the stream.

The envelope is fixed; the payload is the topic's own model, defined beside the verbs of the service that emits it.
Topics and payload fields are containerd's (`/tasks/exit`, `/images/create`, …), plus the network's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from shoal_bus.message import Message

P = TypeVar("P", bound=Message)


class Event(Message):
    """One event as it travels, on the subject `shoal.v1.<node>.<namespace>.event.<service>.<topic…>.<id>`."""

    node: str
    namespace: str
    """Empty for an event that concerns the whole node."""
    service: str
    topic: str
    id: str = ""
    timestamp: datetime
    payload: dict[str, Any] = {}


@dataclass(frozen=True)
class Topic(Generic[P]):
    """A topic and its payload, as `TASK_EXIT = Topic("runtime", "/tasks/exit", TaskExit, "container_id")`.

    `id_field` names the payload's field that goes into the subject as the event's id.
    """

    service: str
    name: str
    payload: type[P]
    id_field: str
    doc: str = ""
