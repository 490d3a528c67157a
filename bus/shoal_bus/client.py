"""The typed client: what the command line, the gateway, controllers and the services themselves call each other with.

    async with Client.open(address, node="edge-7") as client:
        image = await client.call(content.IMAGE_GET, content.ImageRequest(name="docker.io/library/busybox:latest"))
        async for task in client.stream(runtime.TASK_LIST, runtime.ListTasks()):
            print(task.container_id, task.status)

A call that isn't answered is asked again, with the same id, until its time is up: a killed copy of a service is no
error as long as another one, or the next, answers. Errors are those of `shoal_bus.errors`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import msgpack
import nats.errors
from nats.aio.msg import Msg

from shoal_bus import subjects, wire
from shoal_bus.connection import Address, Connection, connect
from shoal_bus.errors import DeadlineExceeded, ResourceExhausted, ShoalError, Unavailable
from shoal_bus.message import Message, Request, unpack
from shoal_bus.mux import Mailbox, Mux
from shoal_bus.verb import AnyVerb, OperationVerb, StreamVerb, Verb

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)
Pro = TypeVar("Pro", bound=Message)

TIMEOUT_SECONDS = 30.0
"""How long a call may take where its caller doesn't say."""
PATIENCE_SECONDS = 10.0
"""How long a call waits for a service that isn't there at all, before it is UNAVAILABLE."""
_FIRST_ATTEMPT, _LONGEST_ATTEMPT = 3.0, 30.0
_UNLIMITED = 3600.0
"""What a call without a limit tells the service it has left; it asks again long before."""


class Unreached(Unavailable):
    """UNAVAILABLE because nothing answers, and no attempt can have reached a service: nothing was begun."""


class _Lost(Exception):
    """No answer to this attempt: another one may be made. One with a text is certain not to have reached a service."""


@dataclass(frozen=True)
class Reply:
    """A reply put together again: its bytes, and, of an operation or a wait, whether to ask again."""

    data: bytes
    again: int | None = None


class Client:
    """A caller's view of one node and one namespace; cheap to make for another (`with_namespace`, `with_node`)."""

    def __init__(
        self,
        connection: Connection,
        node: str,
        namespace: str = "default",
        *,
        mux: Mux | None = None,
        away: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        lease: str = "",
    ) -> None:
        self.connection, self.node, self.namespace, self.lease = connection, node, namespace, lease
        self.mux = mux or Mux(connection)
        self.away = away
        """Entered while a call waits: a handler gives up its slot for so long."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls, address: Address, node: str, namespace: str = "default", *, name: str = "shoal-client"
    ) -> AsyncIterator[Self]:
        """A client with a connection of its own, closed at the end of the block."""
        connection = await connect(address, name=name)
        try:
            yield cls(connection, node, namespace)
        finally:
            await connection.close()

    def with_namespace(self, namespace: str) -> Client:
        """The same connection, for another namespace."""
        return Client(self.connection, self.node, namespace, mux=self.mux, away=self.away)

    def with_node(self, node: str) -> Client:
        """The same connection, for another node."""
        return Client(self.connection, node, self.namespace, mux=self.mux, away=self.away)

    def with_lease(self, lease: str) -> Client:
        """The same connection and namespace; what is made through it belongs to a lease of that namespace, or of none.

        A client for another namespace or node has none.
        """
        return Client(self.connection, self.node, self.namespace, mux=self.mux, away=self.away, lease=lease)

    # ------------------------------------------------------------------------------------------------------------ calls

    async def call(
        self,
        verb: Verb[Req, Rep],
        request: Req,
        *,
        timeout: float | None = TIMEOUT_SECONDS,
        id: str = "",
        patience: float = PATIENCE_SECONDS,
        trace: str = "",
    ) -> Rep:
        """The reply to one request. `timeout` in seconds; None waits as long as it takes (for verbs that wait).

        `id` is the request's id where the caller has one to repeat. Raises what the service raised; UNAVAILABLE when
        nothing answers within `patience` seconds; DEADLINE_EXCEEDED when the time is up.
        """
        call = _Call(self, verb, request, timeout, id, patience, trace)
        while True:
            reply = await call.ask()
            if reply.again is None:
                return verb.reply.unpack(reply.data)

    async def operate(
        self,
        verb: OperationVerb[Req, Rep, Pro],
        request: Req,
        *,
        on_progress: Callable[[Pro], object] | None = None,
        timeout: float | None = None,
        id: str = "",
        patience: float = PATIENCE_SECONDS,
        trace: str = "",
        detached: bool = False,
    ) -> Rep:
        """The result of long work, whose progress is told on the way. Cancelling this call cancels the work.

        With `detached` it leaves the work to whoever asks next under its id.
        """
        call = _Call(self, verb, request, timeout, id, patience, trace)
        seen = 0
        try:
            while True:
                reply = await call.ask({wire.SEEN: str(seen)})
                if reply.again is None:
                    return verb.reply.unpack(reply.data)
                if reply.again > seen and reply.data and on_progress is not None:
                    on_progress(verb.progress.unpack(reply.data))
                seen = max(seen, reply.again)
        except (asyncio.CancelledError, DeadlineExceeded):
            if not detached:
                await self._cancel(call)
            raise

    async def _cancel(self, call: _Call) -> None:
        with suppress(Exception):  # best effort: an operation nobody asks after is cancelled anyway
            headers = call.headers(1.0) | {wire.SEEN: "cancel"}
            await self.connection.publish(call.subject, call.payload, headers=headers)
            await self.connection.flush(1)

    async def stream(
        self,
        verb: StreamVerb[Req, Rep],
        request: Req,
        *,
        timeout: float | None = TIMEOUT_SECONDS,
        patience: float = PATIENCE_SECONDS,
        trace: str = "",
    ) -> AsyncIterator[Rep]:
        """The items of a stream, as they come. Leaving the loop early tells the service to stop.

        A stream that breaks off before its first item is asked for again; later it is UNAVAILABLE.
        """
        call = _Call(self, verb, request, timeout, "", patience, trace)
        while True:
            unpacker = msgpack.Unpacker(timestamp=3, raw=False, strict_map_key=False, max_buffer_size=0)
            started = False
            try:
                async with aclosing(call.replies({})) as parts:
                    async for data, _ in parts:
                        unpacker.feed(data)
                        for value in unpacker:
                            started = True
                            yield verb.item.of(value)
                return
            except _Lost as lost:
                if started:
                    raise Unavailable(f"{verb.name}: the stream broke off", hint="ask again") from lost
                await call.pause(lost)

    async def collect(
        self, verb: StreamVerb[Req, Rep], request: Req, *, timeout: float | None = TIMEOUT_SECONDS
    ) -> list[Rep]:
        """All items of a stream; one that breaks off is asked for once more, from its beginning."""
        try:
            return [item async for item in self.stream(verb, request, timeout=timeout)]
        except Unavailable:
            return [item async for item in self.stream(verb, request, timeout=timeout)]


class _Call:
    """One request, however often it is asked."""

    def __init__(
        self,
        client: Client,
        verb: AnyVerb,
        request: Request,
        timeout: float | None,
        id: str,
        patience: float,
        trace: str,
    ) -> None:
        self._client, self._verb = client, verb
        self.subject = verb.subject(client.node, subjects.WHOLE_NODE if verb.behaviour.whole_node else client.namespace)
        self.payload = request.pack()
        self._id = id or wire.new_id()
        self._trace = wire.child_traceparent(trace)
        self._lease = wire.lease_header(client.lease)
        now = time.monotonic()
        self._ends = None if timeout is None else now + timeout
        self._patience = patience
        self._patience_ends = now + patience
        self._attempts = self._silences = 0
        self._reached = False
        limit = client.connection.max_payload - wire.HEADROOM
        if len(self.payload) > limit:
            raise ResourceExhausted(
                f"{verb.name}: the request has {len(self.payload)} bytes, the bus carries {limit}",
                hint="send it in smaller pieces, or raise max_payload on the NATS server",
            )

    def headers(self, timeout: float) -> dict[str, str]:
        return {
            wire.REQUEST_ID: self._id,
            wire.TIMEOUT: str(max(1, int(timeout * 1000))),
            wire.TRACEPARENT: self._trace,
        } | self._lease

    def _left(self) -> float:
        if self._ends is None:
            return float("inf")
        left = self._ends - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"{self._verb.name}: no answer in time")
        return left

    async def ask(self, extra: dict[str, str] | None = None) -> Reply:
        """One whole reply; asked again as long as none comes."""
        while True:
            box = self._client.mux.open((self._client.node, self._verb.service))
            try:
                first = await self._first(box, extra)
                told = first.headers or {}
                if wire.PART in told:
                    reply = await self._whole(box, first)
                else:
                    self._raise(told)
                    reply = Reply(first.data, _again(told))
                self._attempts = self._silences = 0
                self._reached = True
                self._patience_ends = time.monotonic() + self._patience
                return reply
            except _Lost as lost:
                await self.pause(lost)
            finally:
                self._client.mux.close(box)

    async def _whole(self, box: Mailbox, first: Msg) -> Reply:
        chunks: list[bytes] = []
        again: int | None = None
        async with aclosing(self._parts(box, first)) as parts:
            async for data, told in parts:
                chunks.append(data)
                again = told
        return Reply(b"".join(chunks), again)

    async def pause(self, lost: _Lost) -> None:
        """Waits a little before the next attempt, or raises what there is to say."""
        self._left()
        self._reached = self._reached or not str(lost)
        if str(lost) and time.monotonic() > self._patience_ends:
            raise (Unavailable if self._reached else Unreached)(
                f"{self._verb.name}: nothing answers on node {self._client.node}",
                hint=f"is the {self._verb.service} service of that node running?",
            ) from None
        self._attempts += 1
        async with self._client.away():
            await asyncio.sleep(min(0.01 * 2 ** min(self._attempts, 6), 0.5, self._left()))

    async def replies(self, extra: dict[str, str]) -> AsyncGenerator[tuple[bytes, int | None], None]:
        """The payloads of one attempt, the last one with what it says of asking again."""
        box = self._client.mux.open((self._client.node, self._verb.service))
        try:
            first = await self._first(box, extra)
            async with aclosing(self._parts(box, first)) as parts:
                async for part in parts:
                    yield part
        finally:
            self._client.mux.close(box)

    async def _first(self, box: Mailbox, extra: dict[str, str] | None) -> Msg:
        """Asks once, and returns what comes first."""
        mux = self._client.mux
        connection = mux.connection
        if not connection.is_connected:
            # Patience is for a bus that is away, too.
            async with self._client.away():
                await connection.wait_up(min(self._left(), max(0.01, self._patience_ends - time.monotonic())))
        try:
            await mux.start()
            await mux.watch(self._client.node, self._verb.service)
            left = self._left()
            headers = self.headers(left if left != float("inf") else _UNLIMITED)
            connection.send(self.subject, self.payload, box.subject, headers | extra if extra else headers)
        except nats.errors.Error as error:
            raise _Lost("the bus isn't there") from error
        return await self._next(box, self._silence(), started=False)

    async def _parts(self, box: Mailbox, message: Msg) -> AsyncGenerator[tuple[bytes, int | None], None]:
        """The payloads of a sequence that begins with `message`."""
        finished, last_ack, expected = False, "", 1
        try:
            while True:
                told = message.headers or {}
                if wire.PART not in told:
                    finished = True
                    self._raise(told)
                    yield message.data, _again(told)
                    return
                number = int(told[wire.PART])
                if number > expected:
                    raise _Lost
                if number == expected:  # and not a sign of life, or a second answer to a request asked twice
                    expected += 1
                    last_ack = message.reply
                    finished = wire.END in told
                    if message.data or finished:
                        yield message.data, _again(told)  # what came before an error comes before it here, too
                    if finished:
                        self._raise(told)
                        return
                    self._acknowledge(message.reply, b"")
                message = await self._next(box, wire.PART_IDLE_SECONDS, started=expected > 1)
        finally:
            if not finished and last_ack:
                self._acknowledge(last_ack, wire.STOP)

    def _silence(self) -> float:
        """How long an attempt may go unanswered. At a verb that waits the service itself says something in time."""
        if isinstance(self._verb, OperationVerb):
            return wire.OPERATION_POLL_SECONDS + _FIRST_ATTEMPT
        if isinstance(self._verb, Verb) and self._verb.waits:
            return wire.POLL_SECONDS + _FIRST_ATTEMPT
        return float(min(_FIRST_ATTEMPT * 2**self._silences, _LONGEST_ATTEMPT))

    async def _next(self, box: Mailbox, seconds: float, *, started: bool) -> Msg:
        while True:
            try:
                async with self._client.away():
                    message = await box.next(min(seconds, self._left()))
            except TimeoutError:
                self._left()
                self._silences += 1
                raise _Lost from None
            if message is None:
                if not started or not self._client.connection.is_connected:
                    raise _Lost  # a new copy is there, or the bus is back: whoever was asked may be gone
            elif message.headers is not None and message.headers.get("Status") == wire.NO_RESPONDERS:
                raise _Lost("no responders")
            else:
                return message

    def _acknowledge(self, subject: str, data: bytes) -> None:
        with suppress(nats.errors.Error):
            self._client.mux.connection.send(subject, data)

    @staticmethod
    def _raise(headers: Any) -> None:
        error: ShoalError | None = wire.error_of(headers)
        if error is not None:
            raise error


def decode_any(data: bytes) -> Any:
    """A reply's payload without its model: for tools that print whatever came."""
    return unpack(data) if data else {}


def _again(headers: Mapping[str, str]) -> int | None:
    return int(headers[wire.AGAIN]) if wire.AGAIN in headers else None
