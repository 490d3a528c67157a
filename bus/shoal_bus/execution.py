"""Requests that change something, carried out: once by their id, under their lock, also what a dead copy began."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import structlog

from shoal_bus import wire
from shoal_bus.admission import Slot
from shoal_bus.client import Client
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import Cancelled, Code, DeadlineExceeded, ShoalError, from_exception
from shoal_bus.locks import Locks
from shoal_bus.message import Request
from shoal_bus.once import Intent, Recorded, Requests
from shoal_bus.registered import Registered
from shoal_bus.verb import OperationVerb

log = structlog.get_logger(__name__)

ABANDONED_SECONDS = 45.0
"""An operation nobody has asked after for so long is cancelled."""
SWEEP_SECONDS = 2.0
_RETRIED = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED})
"""Errors after which a dead copy's request stays begun: another try, later, may finish it."""


class Execution:
    """What one copy of a service carries out of the requests that change something."""

    def __init__(
        self, client: Client, database: Database, locks: Locks, verbs: Mapping[str, Registered], draining: asyncio.Event
    ) -> None:
        self.requests, self.locks = Requests(database), locks
        self._client, self._database, self._verbs, self._draining = client, database, verbs, draining
        self._resuming: set[asyncio.Task[None]] = set()

    async def once(
        self,
        registered: Registered,
        context: Context,
        request: Request,
        payload: bytes,
        headers: Mapping[str, str],
        slots: asyncio.Semaphore,
    ) -> bytes:
        """The reply to a request: of this very execution, or of the one that was made under its id before."""
        key = registered.lock_key(context.namespace, request)
        if not self.locks.try_acquire(key):
            # A repeat of what is done needn't wait for those at work.
            found = self.requests.find(context.id, registered.name, context.namespace, payload)
            if found is not None and (answer := found.outcome()) is not None:
                return answer
            # The lock comes before the slot: those who wait for it must not keep its holder's calls from a slot.
            await self.locks.acquire(key)
        try:
            return await self._once(registered, context, request, payload, headers, slots, key)
        finally:
            self.locks.release(key)

    async def _once(
        self,
        registered: Registered,
        context: Context,
        request: Request,
        payload: bytes,
        headers: Mapping[str, str],
        slots: asyncio.Semaphore,
        key: str,
    ) -> bytes:
        found, others = self.requests.look(context.id, registered.name, context.namespace, payload, key)
        if others:
            await self.finish_orphans(key, context.id)
        if found is not None and (answer := found.outcome()) is not None:
            return answer
        async with Slot(slots) as slot:
            if context.ends is not None and time.monotonic() > context.ends:
                raise DeadlineExceeded(f"{registered.name}: the caller's time was up before its turn came")
            context.resumed = found is not None
            if not context.resumed:
                intent = Intent(context.id, registered.name, context.namespace, key, payload, headers)
                if registered.begins_itself:
                    context._intent = intent
                else:
                    self.requests.begin(intent)
            context.client.away = slot.away
            return await self.carry_out(registered, context, request)

    async def carry_out(
        self, registered: Registered, context: Context, request: Request, *, keep_error: bool = False
    ) -> bytes:
        """Runs a handler that changes something, and records how it ended; a transient error only with `keep_error`."""
        context._requests = self.requests
        try:
            reply = await registered.handler(context, request)
        except asyncio.CancelledError:
            raise  # it stays begun: whoever comes next under its lock finishes it
        except Exception as raised:
            if context.answered is not None:
                context.log.exception("request.failed_after_its_answer")
                return context.answered
            self.requests.fail(context.id, from_exception(raised), keep=keep_error, intent=context._intent)
            raise
        if context.answered is None:
            with self._database.write() as tx:
                context.answer(tx, reply)
        assert context.answered is not None
        return context.answered

    # ----------------------------------------------------------------------------------------------- what the dead left

    async def finish_orphans(self, key: str, but: str) -> None:
        """Finishes what dead copies began under a lock that is held now, so that what comes next finds it whole."""
        for orphan in self.requests.begun(key):
            registered = self._verbs.get(orphan.verb)
            if orphan.id == but or registered is None:
                continue
            # An operation is begun before its turn under this lock has come: its owner holds another, and its client
            # will have it taken over.
            if not isinstance(registered.verb, OperationVerb):
                await self._resume(registered, orphan)

    async def sweep_for_ever(self) -> None:
        """Sweeps every now and then."""
        while True:
            try:
                self.sweep()
                self.requests.prune()
            except Exception:
                log.exception("sweep.failed")
            await asyncio.sleep(SWEEP_SECONDS)

    def sweep(self) -> None:
        """Begins to finish requests whose owner is dead and whose caller doesn't ask again."""
        for recorded in self.requests.begun():
            registered = self._verbs.get(recorded.verb)
            if registered is None:
                continue
            operation = isinstance(registered.verb, OperationVerb)
            if operation and time.time() - recorded.asked_at < ABANDONED_SECONDS:
                continue
            key = owner_key(recorded.id) if operation else recorded.lock
            if self.locks.try_acquire(key):
                task = asyncio.create_task(self._finish_orphan(registered, recorded.id, key))
                self._resuming.add(task)
                task.add_done_callback(self._resuming.discard)

    async def _finish_orphan(self, registered: Registered, id: str, key: str) -> None:
        try:
            current = self.requests.get(id)
            if current is not None and current.state == "begun":
                await self._resume(registered, current)
        except Exception:
            log.exception("sweep.failed", request=id)
        finally:
            self.locks.release(key)

    async def stop(self) -> None:
        """Leaves what is being finished to the next copy."""
        tasks = list(self._resuming)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def undo_orphan(self, registered: Registered, id: str) -> bool:
        """Undoes an operation that nobody wants any more, if its owner is dead; says whether it did."""
        key = owner_key(id)
        if not self.locks.try_acquire(key):
            return False
        await self._finish_orphan(registered, id, key)
        return True

    async def _resume(self, registered: Registered, recorded: Recorded) -> None:
        """Finishes what a dead owner began (its lock is held); an operation is undone: nobody wants it any more."""
        context = Context(
            id=recorded.id,
            node=self._client.node,
            namespace=recorded.namespace,
            client=self._client.with_namespace(recorded.namespace),
            lease=wire.lease_of(recorded.headers),
            trace=recorded.headers.get(wire.TRACEPARENT, ""),
            resumed=True,
            draining=self._draining,
            log=log.bind(request=recorded.id, node=self._client.node, namespace=recorded.namespace, verb=recorded.verb),
        )
        try:
            request = registered.verb.request.unpack(recorded.payload)
            context.log.info("request.resumed")
            if registered.undo is None:
                await self._carry_on(registered, context, request)
            else:
                await registered.undo(context, request)
                self.requests.fail(recorded.id, Cancelled(f"{recorded.verb}: cancelled"))
        except Exception as raised:
            error = from_exception(raised)
            if error.code in _RETRIED:
                context.log.warning("request.resumed_later", error=str(error))
                return
            self.requests.fail(recorded.id, error)
            context.log.warning("request.resumed_failed", error=str(error), exc_info=not isinstance(raised, ShoalError))

    async def _carry_on(self, registered: Registered, context: Context, request: Request) -> None:
        context._requests = self.requests
        reply = await registered.handler(context, request)
        if context.answered is None:
            with self._database.write() as tx:
                self.requests.finish(tx, context.id, reply.pack())


def owner_key(id: str) -> str:
    """The lock that an operation's owner holds as long as it lives."""
    return f"operation {id}"
