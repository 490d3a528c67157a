"""Durable commands: requests that wait in a stream until their node can carry them out.

    id = await submit(client.with_node("edge-7"), runtime.TASK_RUN, request, expires=3600)

The node may be off, its services may be down: its dispatcher (`shoal_bus.dispatcher`) carries the command out when it
can, and how it ended is an event (`shoal_bus.api.commands`). Expiry goes by the server's clock alone: a command expires
`Shoal-Expires` seconds after the time at which its stream stored it, neither clock of submitter or node being asked.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import Header

from shoal_bus import logs, streams, subjects, wire
from shoal_bus.api import snapshot
from shoal_bus.client import TIMEOUT_SECONDS, Client
from shoal_bus.errors import Internal, InvalidArgument, ResourceExhausted, ShoalError, Unavailable
from shoal_bus.identifiers import check_identifier
from shoal_bus.message import Message, Request
from shoal_bus.once import fingerprint
from shoal_bus.verb import AnyVerb, OperationVerb, Verb

log = logs.get_logger(__name__)

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)
Pro = TypeVar("Pro", bound=Message)

LONGEST_ID = 200
_PUBLISH_SECONDS = 5.0
_PAUSE_SECONDS = 0.25
_STREAM_FULL = frozenset({10047, 10054, 10077})
"""JetStream's error codes for a stream or an account without room, and a message larger than the stream takes."""
_ORDERED_BY = ("container_id", "id", "key", "name")
"""The request fields that say what a command is about, the first of them that it has."""


async def submit(
    client: Client,
    verb: Verb[Req, Rep] | OperationVerb[Req, Rep, Pro],
    request: Req,
    *,
    expires: float | None = None,
    id: str = "",
    timeout: float = TIMEOUT_SECONDS,
    domain: str = "",
    trace: str = "",
) -> str:
    """Leaves a command for `client`'s node and namespace, and returns its id once the stream has it on record.

    `expires` is seconds from then, after which it is no longer begun. Submitting again under the same `id` is the same
    command. Raises INVALID_ARGUMENT for a verb that changes nothing and for `_all` (each command has one node that
    carries it out: submit one for each), RESOURCE_EXHAUSTED when the stream is full, UNAVAILABLE when there is no
    answer within `timeout` seconds: the command may have been taken then, so submit it again under the same id.
    """
    _check_verb(verb)
    if client.node == subjects.ALL_NODES:
        raise InvalidArgument("a command is for one node, not for all of them", hint="submit one for each node")
    if expires is not None and not (math.isfinite(expires) and expires > 0):
        raise InvalidArgument(f"expires {expires}: must be a number of seconds above 0")
    id = _checked_id(id or wire.new_id())
    namespace = subjects.WHOLE_NODE if verb.behaviour.whole_node else check_identifier(client.namespace, "namespace")
    subject = subjects.command(client.node, namespace, verb.service, verb.resource, verb.verb)
    payload = request.pack()
    limit = client.connection.max_payload - wire.HEADROOM
    if len(payload) > limit:
        raise ResourceExhausted(f"{verb.name}: the command has {len(payload)} bytes, the bus carries {limit}")
    headers = {
        # The stream is every node's: one id for a command to each of several nodes must not make them duplicates.
        Header.MSG_ID.value: f"{client.node}.{id}",
        Header.EXPECTED_STREAM.value: streams.COMMANDS,
        wire.REQUEST_ID: id,
        wire.TRACEPARENT: wire.child_traceparent(trace),
    }
    if expires is not None:
        headers[wire.EXPIRES] = f"{expires:.3f}"
    js = JetStreamContext(client.connection, domain=domain or None)
    try:
        async with asyncio.timeout(timeout):
            await _publish(client, js, subject, payload, headers)
    except TimeoutError:
        raise Unavailable(
            f"command {id}: the stream of commands didn't answer, it may have it or not",
            hint="submit it again under the same id",
        ) from None
    return id


async def _publish(client: Client, js: JetStreamContext, subject: str, payload: bytes, headers: dict[str, str]) -> None:
    while True:
        await client.connection.up.wait()
        try:
            ack = await client.connection.while_up(
                js.publish(subject, payload, timeout=_PUBLISH_SECONDS, headers=dict(headers))
            )
            if ack.stream != streams.COMMANDS:
                raise Internal(f"command {subject}: taken by stream {ack.stream!r}")
            return
        except nats.js.errors.NoStreamResponseError:
            await client.connection.while_up(streams.ensure_commands(js))
        except nats.js.errors.APIError as error:
            if error.err_code in _STREAM_FULL:
                raise ResourceExhausted(
                    f"the stream of commands has no room ({error.description})",
                    hint=f"purge the commands of nodes that are gone from {streams.COMMANDS}, or raise its max_bytes",
                ) from None
            log.debug("command.submitting", subject=subject, error=str(error))
            await asyncio.sleep(_PAUSE_SECONDS)
        except (TimeoutError, nats.errors.Error, nats.js.errors.Error, OSError, Unavailable) as error:
            log.debug("command.submitting", subject=subject, error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_PAUSE_SECONDS)


class Verbs:
    """The verbs a dispatcher knows, by the tokens of a subject."""

    def __init__(self, verbs: Iterable[AnyVerb]) -> None:
        self._verbs = {(verb.service, verb.resource, verb.verb): verb for verb in verbs}

    def find(self, service: str, resource: str, verb: str) -> AnyVerb:
        """The verb; INVALID_ARGUMENT where there is none, or none that changes something."""
        found = self._verbs.get((service, resource, verb))
        if found is None and service == snapshot.SNAPSHOT_PREPARE.service:
            # A snapshotter's name is the resource: any process may be one, and all have the same verbs.
            found = self._verbs.get((service, snapshot.DEFAULT, verb))
            found = found.on(resource) if found is not None else None
        if found is None:
            raise InvalidArgument(f"{service}.{resource}.{verb}: there is no such verb")
        _check_verb(found)
        return found


@dataclass(frozen=True)
class Command:
    """A command as its stream has it. One with a `refusal` can't be carried out, ever."""

    id: str
    name: str
    """Its verb's name, as `runtime.task.start`."""
    namespace: str
    """`_` where it concerns the whole node."""
    order: tuple[str, str]
    """Commands with the same one are carried out one after another."""
    hash: bytes
    submitted: datetime
    expires: float | None = None
    trace: str = ""
    size: int = 0
    verb: AnyVerb | None = None
    request: Request | None = None
    refusal: ShoalError | None = None


def read(message: Msg, verbs: Verbs) -> Command:
    """The command that a message of the stream holds, whatever it holds: this never raises for what is in it."""
    headers = message.headers or {}
    metadata = message.metadata
    stamp = f"{metadata.sequence.stream}.{int(metadata.timestamp.timestamp() * 1e6)}"
    fields: dict[str, Any] = {
        "id": f"unnamed.{stamp}",  # the same at every delivery
        "name": message.subject.partition(f".{subjects.COMMAND}.")[2] or message.subject,
        "namespace": subjects.WHOLE_NODE,
        "order": ("", stamp),
        "hash": fingerprint(message.subject, "", message.data),
        "submitted": metadata.timestamp,
        "size": len(message.data),
        "trace": headers.get(wire.TRACEPARENT, ""),
    }
    try:
        if wire.REQUEST_ID in headers:
            fields["id"] = _checked_id(headers[wire.REQUEST_ID])
        parsed = subjects.parse(message.subject)
        if not isinstance(parsed, subjects.Command):
            raise InvalidArgument(f"subject {message.subject!r}: not a command's")
        if parsed.namespace != subjects.WHOLE_NODE:
            fields["namespace"] = check_identifier(parsed.namespace, "namespace")
        verb = fields["verb"] = verbs.find(parsed.service, parsed.resource, parsed.verb)
        # Who may publish in one namespace must not reach the whole node by it.
        if verb.behaviour.whole_node != (parsed.namespace == subjects.WHOLE_NODE):
            wanted = f"{subjects.WHOLE_NODE!r}" if verb.behaviour.whole_node else "a namespace"
            raise InvalidArgument(f"{verb.name}: the namespace token must be {wanted}")
        fields["expires"] = _expires(headers)
        request = fields["request"] = verb.request.unpack(message.data)
        fields["order"] = (fields["namespace"], _about(request) or f"{verb.service}.{verb.resource}")
    except ShoalError as error:
        fields["refusal"] = error
    return Command(**fields)


def _about(request: Request) -> str:
    return next((value for name in _ORDERED_BY if isinstance(value := getattr(request, name, None), str) and value), "")


def _expires(headers: dict[str, str]) -> float | None:
    if wire.EXPIRES not in headers:
        return None
    try:
        seconds = float(headers[wire.EXPIRES])
    except ValueError:
        seconds = -1.0
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidArgument(f"{wire.EXPIRES}: must be a number of seconds above 0")
    return seconds


def _checked_id(id: str) -> str:
    if not id or len(id) > LONGEST_ID or not id.isascii() or not id.isprintable():
        raise InvalidArgument(f"a command's id must be printable ASCII of at most {LONGEST_ID} characters")
    return id


def _check_verb(verb: AnyVerb) -> None:
    if not (isinstance(verb, OperationVerb) or (isinstance(verb, Verb) and verb.mutates)):
        raise InvalidArgument(f"{verb.name}: changes nothing, so it can't be a command", hint="ask it as a request")
