"""Durable commands: how one ended is an event, whoever submitted it and wherever he is by then.

A command is the request of a verb that changes something, published to
`shoal.v1.<node>.<namespace>.command.<service>.<resource>.<verb>`. Each ends in exactly one of these events.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from shoal_bus.events import Topic
from shoal_bus.message import Message


class CommandDone(Message):
    """A command that was carried out. `reply` is its verb's reply, left out where it is too large for an event."""

    id: str
    verb: str
    namespace: str
    reply: dict[str, Any] = {}
    reply_left_out: bool = False


class CommandFailed(Message):
    """A command that was refused, or failed: gRPC's code by name, one sentence, and the mend where there is one."""

    id: str
    verb: str
    namespace: str
    code: str
    message: str
    hint: str = ""


class CommandExpired(Message):
    """A command whose time was up before it could be begun."""

    id: str
    verb: str
    namespace: str
    submitted_at: datetime
    expires: float


SERVICE = "commands"

DONE = Topic(SERVICE, "/commands/done", CommandDone, "id")
FAILED = Topic(SERVICE, "/commands/failed", CommandFailed, "id")
EXPIRED = Topic(SERVICE, "/commands/expired", CommandExpired, "id")
