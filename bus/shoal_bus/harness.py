"""The service harness: what every process does with its requests, over NATS's micro protocol.

    service = Service("content", connection, node=node, database=db, locks=locks)
    service.handle(content.IMAGE_GET, images.get)
    service.handle(content.IMAGE_CREATE, images.create, lock=lambda r: f"image/{r.name}")
    service.stream(content.IMAGE_LIST, images.list)
    service.operate(content.IMAGE_PULL, pull, undo=undo_pull, lock=lambda r: f"image/{r.name}")
    await service.start()
    …
    await service.drain()

`nats micro ls`, `info` and `stats` show it. Beyond nats-py's own `micro`: handlers run as tasks, under a bound that
waits, streams and operations don't use up; requests that change something are done once by their id; a drain answers
what is in flight; every exception becomes one sentence with a canonical code; what a caller no longer waits for is
neither begun nor answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.micro.service import ServiceConfig

from shoal_bus import subjects, wire
from shoal_bus.admission import Slot
from shoal_bus.client import Client
from shoal_bus.connection import Connection, Listener
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ShoalError,
    from_exception,
)
from shoal_bus.execution import Execution
from shoal_bus.identifiers import check_identifier
from shoal_bus.locks import Locks
from shoal_bus.message import Message, Request
from shoal_bus.micro import AnsweredEndpoint, MicroService
from shoal_bus.operations import CANCEL, Operations
from shoal_bus.parts import PartSender, Stopped, single
from shoal_bus.registered import Registered
from shoal_bus.verb import AnyVerb, OperationVerb, StreamVerb, Verb

log = structlog.get_logger(__name__)

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)
Pro = TypeVar("Pro", bound=Message)

BOUND = 64
"""Handlers at work at once; the next ones wait their turn."""
LONG_BOUND = 20_000
"""Waits, streams and operations at once; the next one is RESOURCE_EXHAUSTED."""
QUEUE_BOUND = 20_000
DRAIN_SECONDS = 10.0
_LONGEST_ID = 256


@dataclass(frozen=True)
class _Caller:
    """Somebody who waits for a reply, and until when."""

    message: Msg
    ends: float | None

    @property
    def gone(self) -> bool:
        return not self.message.reply or (self.ends is not None and time.monotonic() > self.ends)


@dataclass
class _InFlight:
    """A request that changes something, at work here, and everybody who asked for it."""

    payload: bytes
    context: Context
    callers: list[_Caller]


class Service:
    """One copy of a service on a node.

    `database` and `locks` are needed for verbs that change something; a service that only translates has neither.
    """

    def __init__(
        self,
        name: str,
        connection: Connection,
        *,
        node: str,
        version: str = "0.1.0",
        description: str = "",
        database: Database | None = None,
        locks: Locks | None = None,
        bound: int = BOUND,
    ) -> None:
        self.name, self.node, self.connection = name, subjects.check_node(node), connection
        self.client = Client(connection, node, subjects.WHOLE_NODE)
        self.draining = asyncio.Event()
        self._verbs: dict[str, Registered] = {}
        self._execution: Execution | None = None
        self._operations: Operations | None = None
        if database is not None and locks is not None:
            self._execution = Execution(self.client, database, locks, self._verbs, self.draining)
            self._operations = Operations(self._execution, self.draining)
        self._group = subjects.queue_group(node, name)
        self._micro = MicroService(
            connection,
            ServiceConfig(
                name=f"shoal-{name}",
                version=version,
                description=description or f"shoal's {name} service",
                metadata={"node": node},
                queue_group=self._group,
            ),
        )
        self._endpoints: dict[str, AnsweredEndpoint] = {}
        self._slots = asyncio.Semaphore(bound)
        self._short = self._long = 0
        self._waits: set[asyncio.Future[None]] = set()
        """Verbs that wait, each until it has an answer, until its caller is to ask again, or until a drain."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._in_flight: dict[tuple[str, str], _InFlight] = {}
        self._background: list[asyncio.Task[Any]] = []
        self._broadcasts: dict[str, Callable[[bytes], None]] = {}
        self._before_stop: list[Callable[[], Awaitable[None]]] = []

    # ---------------------------------------------------------------------------------------------------- registration

    def handle(
        self,
        verb: Verb[Req, Rep],
        handler: Callable[[Context, Req], Awaitable[Rep]],
        *,
        lock: Callable[[Req], str] | None = None,
        begins_itself: bool = False,
    ) -> None:
        """Answers `verb` with `handler`. For a verb that mutates, `lock` says what it changes, as `container/web-1`.

        Handlers under one lock of one namespace run one after another, whichever copy they are in. Such a handler may
        be called again, with `resumed`, for a request that a dead copy began.

        The request is committed before the handler is called. One that `begins_itself` has no effect before its first
        transaction, and records the request in that one: by `ctx.begin(tx)`, or by `ctx.answer(tx, …)` where there is
        no other. That saves a transaction.
        """
        if verb.mutates and (lock is None or self._execution is None):
            raise ValueError(f"{verb.name} mutates: it needs a lock, and the service a database and locks")
        self._verbs[verb.name] = Registered(verb, handler, lock, begins_itself=begins_itself)

    def stream(self, verb: StreamVerb[Req, Rep], handler: Callable[[Context, Req], AsyncIterator[Rep]]) -> None:
        """Answers `verb` with the items an asynchronous generator yields."""
        self._verbs[verb.name] = Registered(verb, handler)

    def operate(
        self,
        verb: OperationVerb[Req, Rep, Pro],
        handler: Callable[[Context, Req], Awaitable[Rep]],
        *,
        undo: Callable[[Context, Req], Awaitable[None]],
        lock: Callable[[Req], str] | None = None,
    ) -> None:
        """Answers `verb` with long work. A handler that raises or is cancelled has undone what it did.

        `undo` does so for one whose copy died, and that nobody asks after any more. Operations under one `lock` run one
        after another; without one, each runs at once.
        """
        if self._operations is None:
            raise ValueError(f"{verb.name} is an operation: its service needs a database and locks")
        self._verbs[verb.name] = Registered(verb, handler, lock, undo)

    def on_broadcast(self, name: str, callback: Callable[[bytes], None]) -> None:
        """Calls `callback` with what any copy of this service on this node broadcasts under `name` (also this one)."""
        self._broadcasts[name] = callback

    async def broadcast(self, name: str, data: bytes = b"") -> None:
        """Tells every copy of this service on this node something. Best effort: nobody may depend on it alone."""
        with suppress(nats.errors.Error):
            await self.connection.publish(subjects.broadcast(self.node, self.name, name), data)

    def broadcast_soon(self, name: str, data: bytes = b"") -> None:
        """`broadcast` from where nothing can be awaited."""
        self._spawn(self.broadcast(name, data))

    def background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Runs `work` beside the requests until the service stops; an exception in it is logged."""
        self._background.append(asyncio.create_task(self._guard(work, name), name=name))

    def before_stop(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Calls `callback` in a drain, after the last request is answered and before the background work is ended."""
        self._before_stop.append(callback)

    async def _guard(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("background.failed", work=name)

    # -------------------------------------------------------------------------------------------------- start and stop

    async def start(self) -> None:
        """Begins to answer. What a dead copy began is finished meanwhile, and before anything else under its lock."""
        if self._operations is not None:
            self.on_broadcast(CANCEL, self._operations.cancel_owned)
        for name, callback in self._broadcasts.items():
            await self._subscribe_broadcast(name, callback)
        for registered in self._verbs.values():
            verb = registered.verb
            self._endpoints[verb.name] = await self._micro.answer(
                name=f"{verb.resource}-{verb.verb}",
                subject=verb.pattern(self.node),
                queue_group=self._group,
                receive=self._receiver(registered),
                metadata={"node": self.node, "doc": verb.behaviour.doc},
            )
        await self._micro.answer(
            name="all-nodes",
            subject=f"{subjects.ROOT}.{subjects.ALL_NODES}.*.{self.name}.>",
            queue_group=self._group,
            receive=self._receive_for_all,
            metadata={"node": self.node},
        )
        await self._micro.start()  # whoever hears from here on that it is there can ask for everything
        await self.connection.flush()
        await self.broadcast(subjects.READY)
        await self.connection.flush()  # who asks from here on doesn't hear it, and needn't ask twice
        if self._execution is not None:
            self.background(self._execution.sweep_for_ever(), "sweep")
        log.info("service.ready", service=self.name, node=self.node, verbs=len(self._verbs))

    async def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Stops orderly: takes no more requests, answers those in flight, and tells waiting callers to ask again."""
        ends = time.monotonic() + seconds
        with suppress(nats.errors.Error, TimeoutError):
            async with asyncio.timeout(seconds):
                await self._micro.stop()
        # Only now: who is told to ask again must not come to us.
        self.draining.set()
        for wait in self._waits:
            _settle(wait)
        if self._operations is not None:
            self._operations.wake()
        pending = {task for task in self._tasks if not task.done()}
        if pending:
            await asyncio.wait(pending, timeout=max(0.1, ends - time.monotonic()))
        for callback in self._before_stop:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(1.0, ends - time.monotonic())):
                    await callback()
        if self._operations is not None and self._execution is not None:
            await self._operations.stop()
            await self._execution.stop()
        tasks = self._background + list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(nats.errors.Error, TimeoutError):
            await self.connection.flush(2)

    async def _subscribe_broadcast(self, name: str, callback: Callable[[bytes], None]) -> None:
        def heard(message: Msg) -> None:
            try:
                callback(message.data)
            except Exception:
                log.exception("broadcast.failed", broadcast=name)

        await self.connection.listen(subjects.broadcast(self.node, self.name, name), heard)

    # --------------------------------------------------------------------------------------------------------- receive

    def _receiver(self, registered: Registered) -> Listener:
        return lambda message: self._spawn(self._serve(registered, message, time.monotonic()))

    def _receive_for_all(self, message: Msg) -> None:
        resource_and_verb = message.subject.split(".")[5:]
        registered = self._verbs.get(".".join([self.name, *resource_and_verb]))
        if registered is not None:
            self._spawn(self._serve(registered, message, time.monotonic()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, registered: Registered, message: Msg, arrived: float) -> None:
        """Serves one request: whatever happens, its caller hears of it in one sentence, and the log of the rest."""
        headers = message.headers or {}
        began = time.perf_counter_ns()
        timeout = wire.timeout_of(headers)
        caller = _Caller(message, None if timeout is None else arrived + timeout)
        error: ShoalError | None = None
        try:
            try:
                context = self._context(message, headers, caller.ends)
                error = await self._dispatch(registered, caller, headers, context)
            except (Stopped, nats.errors.Error):
                raise
            except asyncio.CancelledError:
                # The drain's time is up. What was begun is finished by another copy; this caller may ask it at once.
                await self._reply(caller, b"", {wire.AGAIN: "0"})
                raise
            except Exception as raised:
                error = from_exception(raised)
                if isinstance(error, Internal) and not isinstance(raised, ShoalError):
                    log.exception("request.failed", subject=message.subject, request=headers.get(wire.REQUEST_ID, ""))
                await self._reply(caller, b"", wire.error_headers(error))
        except (Stopped, nats.errors.Error) as gone:
            log.debug("request.caller_gone", subject=message.subject, error=type(gone).__name__)
        finally:
            if error is not None:
                log.info(
                    "request.refused",
                    code=error.code.name,
                    error=str(error),
                    subject=message.subject,
                    node=self.node,
                    request=headers.get(wire.REQUEST_ID, ""),
                )
            endpoint = self._endpoints.get(registered.name)
            if endpoint is not None:
                told = f"{error.code.name}: {error.message}" if error is not None else None
                endpoint.count(time.perf_counter_ns() - began, told)

    def _context(self, message: Msg, headers: Mapping[str, str], ends: float | None) -> Context:
        # Our own subscription matched all tokens but the namespace.
        token = message.subject.split(".")[3]
        whole_node = token == subjects.WHOLE_NODE
        namespace = token if whole_node else check_identifier(subjects.decode(token), "namespace")
        id = headers.get(wire.REQUEST_ID) or wire.new_id()
        if len(id) > _LONGEST_ID or not id.isascii() or not id.isprintable():
            raise InvalidArgument(f"the request id must be printable ASCII of at most {_LONGEST_ID} characters")
        return Context(
            id=id,
            node=self.node,
            namespace=namespace,
            client=self.client.with_namespace(namespace),
            lease=wire.lease_of(headers),
            trace=headers.get(wire.TRACEPARENT, ""),
            ends=ends,
            draining=self.draining,
            # Bound when it is used, which it isn't by most requests.
            log=structlog.get_logger(
                __name__, request=id, node=self.node, namespace=namespace, subject=message.subject
            ),
        )

    async def _dispatch(
        self, registered: Registered, caller: _Caller, headers: dict[str, str], context: Context
    ) -> ShoalError | None:
        verb = registered.verb
        if isinstance(verb, StreamVerb):
            return await self._serve_stream(registered, caller, context)
        if isinstance(verb, OperationVerb):
            await self._serve_operation(registered, caller, headers, context)
        elif isinstance(verb, Verb) and verb.waits:
            await self._serve_wait(registered, caller, context)
        elif isinstance(verb, Verb) and verb.mutates:
            await self._serve_change(registered, caller, headers, context)
        else:
            await self._serve_question(registered, caller, context)
        return None

    async def _reply(self, caller: _Caller, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Answers, unless the caller has given up."""
        if caller.gone:
            return
        if len(data) > wire.part_size(self.connection.max_payload):
            await PartSender(self.client.mux, caller.message.reply, headers).send(single(data))
        else:
            await self.connection.publish(caller.message.reply, data, headers=headers)

    # ----------------------------------------------------------------------------------------------------- short verbs

    async def _serve_question(self, registered: Registered, caller: _Caller, context: Context) -> None:
        """A verb that changes nothing."""
        self._admit_short()
        try:
            async with Slot(self._slots) as slot:
                if caller.ends is not None and time.monotonic() > caller.ends:
                    raise _too_late(registered.verb)
                context.client.away = slot.away
                reply = await registered.handler(context, registered.verb.request.unpack(caller.message.data))
        finally:
            self._short -= 1
        await self._reply(caller, reply.pack())

    async def _serve_change(
        self, registered: Registered, caller: _Caller, headers: dict[str, str], context: Context
    ) -> None:
        """A verb that changes something. The same request at work here already gets the same answer, at no cost."""
        assert self._execution is not None
        payload = caller.message.data
        key = (context.id, caller.message.subject)
        at_work = self._in_flight.get(key)
        if at_work is not None:
            if at_work.payload != payload:
                raise InvalidArgument(
                    f"request id {context.id}: already used for another request", hint="ids are for one request"
                )
            at_work.callers.append(caller)
            if at_work.context.ends is not None:  # it goes on as long as one of them waits
                at_work.context.ends = None if caller.ends is None else max(at_work.context.ends, caller.ends)
            return
        self._admit_short()
        callers = [caller]
        self._in_flight[key] = _InFlight(payload, context, callers)
        try:
            request = registered.verb.request.unpack(payload)
            data, reply_headers = (
                await self._execution.once(registered, context, request, payload, headers, self._slots),
                None,
            )
        except Exception as raised:
            del self._in_flight[key]
            for other in callers[1:]:
                await self._reply(other, b"", wire.error_headers(from_exception(raised)))
            raise
        finally:
            self._short -= 1
            self._in_flight.pop(key, None)
        for waiting in callers:
            await self._reply(waiting, data, reply_headers)

    def _admit_short(self) -> None:
        if self._short >= QUEUE_BOUND:
            raise ResourceExhausted(
                f"{self.name}: {QUEUE_BOUND} requests are waiting already", hint="start another copy"
            )
        self._short += 1

    # ------------------------------------------------------------------------------------ waits, streams and operations

    def _admit_long(self) -> None:
        if self._long >= LONG_BOUND:
            raise ResourceExhausted(f"{self.name}: {LONG_BOUND} waits and streams are under way already")
        self._long += 1

    async def _serve_wait(self, registered: Registered, caller: _Caller, context: Context) -> None:
        request = registered.verb.request.unpack(caller.message.data)
        self._admit_long()
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        work = asyncio.ensure_future(registered.handler(context, request))
        work.add_done_callback(lambda _: _settle(over))
        timer = loop.call_later(0.0 if self.draining.is_set() else _poll(context), _settle, over)
        self._waits.add(over)
        try:
            await over
            if work.done():
                await self._reply(caller, work.result().pack())
            else:
                await self._reply(caller, b"", {wire.AGAIN: "0"})
        finally:
            self._long -= 1
            self._waits.discard(over)
            timer.cancel()
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _serve_stream(self, registered: Registered, caller: _Caller, context: Context) -> ShoalError | None:
        if caller.gone:
            return None
        request = registered.verb.request.unpack(caller.message.data)

        async def packed() -> AsyncIterator[bytes]:
            async for item in registered.handler(context, request):
                yield item.pack()

        sender = PartSender(self.client.mux, caller.message.reply)
        self._admit_long()
        try:
            error = await sender.send(packed())
        finally:
            self._long -= 1
        if isinstance(error, Internal):
            context.log.error("request.failed", error=str(error), exc_info=sender.cause)
        return error

    async def _serve_operation(
        self, registered: Registered, caller: _Caller, headers: dict[str, str], context: Context
    ) -> None:
        assert self._operations is not None
        if headers.get(wire.SEEN) == CANCEL:
            if not await self._operations.cancel(registered, context.id):
                await self.broadcast(CANCEL, context.id.encode())
            return
        self._admit_long()
        try:
            answer, version = await self._operations.ask(
                registered, context, caller.message.data, headers, _poll(context, wire.OPERATION_POLL_SECONDS)
            )
        finally:
            self._long -= 1
        await self._reply(caller, answer, None if version is None else {wire.AGAIN: str(version)})


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _poll(context: Context, longest: float = wire.POLL_SECONDS) -> float:
    """How long a request that waits is kept: a little less than its caller waits, so that it hears from us."""
    return max(0.05, min(longest, context.left() - 0.1))


def _too_late(verb: AnyVerb) -> ShoalError:
    return DeadlineExceeded(f"{verb.name}: the caller's time was up before its turn came")
