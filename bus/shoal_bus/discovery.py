"""Who answers on a node, by NATS's micro protocol: its PING and STATS (ADR-32)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any, TypeVar

import nats.errors
from pydantic import BaseModel, ValidationError

from shoal_bus.connection import Connection
from shoal_bus.errors import Unavailable

PREFIX = "shoal-"
SERVICES = ("content", "snapshot", "runtime", "network")
"""The services a whole node has."""
_SETTLED_SECONDS = 0.1
"""Further copies answer within this time of the last one."""

_FIRST_ROUND_SECONDS, _LONGEST_ROUND_SECONDS = 0.03, 0.5
"""One that isn't there yet never hears that it was asked for; one that is busy answers late."""


class Answering(BaseModel):
    """One copy of a service that answers."""

    name: str
    """The service's name, without the prefix it has in `nats micro ls`."""
    id: str
    version: str = ""
    metadata: dict[str, str] = {}


class EndpointStats(BaseModel):
    """What one endpoint has done; times in nanoseconds."""

    name: str
    num_requests: int = 0
    num_errors: int = 0
    processing_time: int = 0


class ServiceStats(Answering):
    """What one copy of a service has done."""

    endpoints: list[EndpointStats] = []


A = TypeVar("A", bound=Answering)


async def ping(
    connection: Connection,
    node: str,
    *,
    awaited: Collection[str] = SERVICES,
    seconds: float = 1.0,
    further: float = _SETTLED_SECONDS,
) -> list[Answering]:
    """The copies of services that answer on `node`: returns when each of `awaited` has, after `seconds` at most.

    Those that aren't awaited are waited for as long as `further` seconds after the last one.
    """
    return await _ask(connection, "$SRV.PING", Answering, node, awaited, seconds, further)


async def all_answer(
    connection: Connection, node: str, stop: asyncio.Event, *, awaited: Collection[str] = SERVICES, seconds: float
) -> set[str]:
    """Asks again and again until each of `awaited` has answered on `node`, for `seconds` at most and until `stop`.

    Those that haven't.
    """
    missing, ends, pause = set(awaited), time.monotonic() + seconds, _FIRST_ROUND_SECONDS
    while missing and time.monotonic() < ends and not stop.is_set():
        missing -= {one.name for one in await ping(connection, node, awaited=missing, seconds=pause)}
        pause = min(2 * pause, _LONGEST_ROUND_SECONDS)
    return missing


async def stats(
    connection: Connection, node: str, *, awaited: Collection[str] = SERVICES, seconds: float = 1.0
) -> list[ServiceStats]:
    """What the copies of services on `node` have done; waits as `ping` does."""
    return await _ask(connection, "$SRV.STATS", ServiceStats, node, awaited, seconds)


async def _ask(
    connection: Connection,
    subject: str,
    kind: type[A],
    node: str,
    awaited: Collection[str],
    seconds: float,
    further: float = _SETTLED_SECONDS,
) -> list[A]:
    missing, found = set(awaited), []
    ends = time.monotonic() + seconds
    try:
        inbox = connection.new_inbox()
        subscription = await connection.subscribe(inbox)
        try:
            await connection.publish(subject, b"", reply=inbox)
            while (left := min(ends - time.monotonic(), seconds if missing else further)) > 0:
                try:
                    message = await subscription.next_msg(left)
                except (TimeoutError, nats.errors.TimeoutError):
                    break
                answer = _parse(kind, message.data)
                if answer is not None and answer.metadata.get("node") == node:
                    found.append(answer)
                    missing.discard(answer.name)
        finally:
            await subscription.unsubscribe()
    except nats.errors.Error as error:
        raise Unavailable("the bus isn't there", hint="is nats-server running?") from error
    return found


def _parse(kind: type[A], data: Any) -> A | None:
    try:
        answer = kind.model_validate_json(data)
    except ValidationError:
        return None  # other people's services share the protocol
    if not answer.name.startswith(PREFIX):
        return None
    answer.name = answer.name.removeprefix(PREFIX)
    return answer
