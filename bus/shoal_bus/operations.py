"""Operations: long work that one copy owns, any copy reports on, and another one takes over when its owner dies.

The owner holds a lock that dies with it. Progress goes to the database now and then, so that a copy that doesn't own an
operation can tell how far it is. A client asks in polls; an operation that nobody asks after is cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import structlog

from shoal_bus import wire
from shoal_bus.context import Context
from shoal_bus.errors import Aborted, Cancelled, Internal, InvalidArgument, ShoalError, from_exception
from shoal_bus.execution import ABANDONED_SECONDS, Execution, owner_key
from shoal_bus.message import Message, Request
from shoal_bus.once import TRANSIENT, Intent
from shoal_bus.registered import Registered
from shoal_bus.verb import OperationVerb

log = structlog.get_logger(__name__)

CANCEL = "cancel"
"""What a client sends as `Shoal-Seen` when it wants no more, and what the copies are told then."""
_PROGRESS_SECONDS = 0.1
_ENDED_KEPT = 64
_BEGINNING_SECONDS = 2.0
"""How long another copy may take from holding an operation's lock to having it in the database."""


@dataclass
class _Operation:
    """An operation this copy owns."""

    version: int
    asked: float = field(default_factory=time.monotonic)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    unwanted: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    _reported: Message | None = None
    _packed: tuple[int, bytes] = (0, b"")

    def report(self, progress: Message) -> None:
        self._reported, self.version = progress, self.version + 1
        self.wake()

    @property
    def told(self) -> bool:
        """Whether there has been any progress."""
        return self._reported is not None

    @property
    def progress(self) -> bytes:
        """What was reported last, as it is now; packed when somebody wants it: there are more reports than tellings."""
        if self._reported is None:
            return b""
        if self._packed[0] != self.version:
            self._packed = self.version, self._reported.pack()
        return self._packed[1]

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Operations:
    """The operations of one copy of a service."""

    def __init__(self, execution: Execution, draining: asyncio.Event) -> None:
        self._execution, self._requests, self._locks = execution, execution.requests, execution.locks
        self._draining = draining
        self._owned: dict[str, _Operation] = {}
        self._ended: OrderedDict[str, _Operation] = OrderedDict()
        """Those that ended a little while ago here, and whose last progress is told before their result."""

    async def ask(
        self, registered: Registered, context: Context, payload: bytes, headers: Mapping[str, str], seconds: float
    ) -> tuple[bytes, int | None]:
        """An operation's outcome, or, after `seconds` at most, its newest progress and that progress's version."""
        try:
            seen = int(headers.get(wire.SEEN, "0"))
        except ValueError:
            raise InvalidArgument(f"{wire.SEEN}: {headers[wire.SEEN]!r} is not a number") from None
        request = registered.verb.request.unpack(payload)
        found = self._requests.find(context.id, registered.name, context.namespace, payload)
        if found is not None and found.state == "failed" and not seen and found.error().code in TRANSIENT:
            self._requests.forget(context.id)  # a new caller, not one who waits for the outcome: it is tried again
            found = None
        if found is None or found.state == "begun":
            self._adopt(registered, context, request, payload, headers)
        quiet = registered.verb.quiet_seconds if isinstance(registered.verb, OperationVerb) else 0.0
        return await self._follow(context.id, seen, quiet, seconds)

    async def cancel(self, registered: Registered, id: str) -> bool:
        """Cancels an operation that this copy owns or that nobody does; says whether that was so."""
        if id in self._owned:
            self._owned[id].unwanted.set()
            return True
        found = self._requests.get(id)
        if found is None or found.state != "begun" or found.verb != registered.name:
            return True
        return await self._execution.undo_orphan(registered, id)

    def cancel_owned(self, id: bytes) -> None:
        """Cancels an operation if this copy owns it."""
        operation = self._owned.get(id.decode(errors="replace"))
        if operation is not None:
            operation.unwanted.set()

    def wake(self) -> None:
        """Has everybody who waits look again."""
        for operation in self._owned.values():
            operation.wake()

    async def stop(self) -> None:
        """Leaves all of them begun: the next copy that is asked takes over."""
        tasks = [operation.task for operation in self._owned.values() if operation.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _adopt(
        self, registered: Registered, context: Context, request: Request, payload: bytes, headers: Mapping[str, str]
    ) -> None:
        """Makes this copy the operation's owner, unless one is alive."""
        if context.id in self._owned:
            self._owned[context.id].asked = time.monotonic()
            return
        owner = owner_key(context.id)
        if self._draining.is_set() or not self._locks.try_acquire(owner):
            self._requests.asked(context.id)
            return
        try:
            found = self._requests.find(context.id, registered.name, context.namespace, payload)
            if found is not None and found.state != "begun":
                self._locks.release(owner)
                return
            key = registered.lock_key(context.namespace, request)
            if found is None:
                self._requests.begin(Intent(context.id, registered.name, context.namespace, key, payload, headers))
            else:
                self._requests.asked(context.id)
            context.resumed = found is not None
            operation = _Operation(version=found.version if found is not None else 1)
        except BaseException:
            self._locks.release(owner)
            raise
        context._report = operation.report
        self._owned[context.id] = operation
        operation.task = asyncio.create_task(self._own(registered, context, request, operation, key))

    async def _own(
        self, registered: Registered, context: Context, request: Request, operation: _Operation, key: str
    ) -> None:
        """Carries an operation out beside a task that keeps its progress, until it is done or nobody wants it."""
        work = asyncio.create_task(self._carry_out(registered, context, request, key))
        unwanted = asyncio.create_task(self._keep(context.id, operation))
        try:
            await asyncio.wait({work, unwanted}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await _ended(work)
                self._requests.fail(context.id, Cancelled(f"{registered.name}: cancelled"))
                context.log.info("operation.cancelled")
            elif (error := work.exception()) is not None and isinstance(from_exception(error), Internal):
                context.log.error("operation.failed", exc_info=error)
        finally:
            await _ended(work)
            await _ended(unwanted)
            self._owned.pop(context.id, None)
            if isinstance(registered.verb, OperationVerb) and registered.verb.tells_all and operation.told:
                self._ended[context.id] = operation
                while len(self._ended) > _ENDED_KEPT:
                    self._ended.popitem(last=False)
            self._locks.release(owner_key(context.id))
            operation.wake()

    async def _carry_out(self, registered: Registered, context: Context, request: Request, key: str) -> None:
        async with self._locks.hold(key) if key else nullcontext():
            if key:
                await self._execution.finish_orphans(key, context.id)
            await self._execution.carry_out(registered, context, request, keep_error=True)

    async def _keep(self, id: str, operation: _Operation) -> None:
        """Writes progress down, and returns when nobody wants the operation any more."""
        written = operation.version
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROGRESS_SECONDS):
                    await operation.unwanted.wait()
                    return
            if operation.version != written:
                written = operation.version
                try:
                    self._requests.progress(id, written, operation.progress)
                except Exception:
                    # A full disk, say: the other copies aren't told how far it is, and that is all.
                    log.exception("operation.progress_not_kept", request=id)
            if time.monotonic() - operation.asked > ABANDONED_SECONDS:
                row = self._requests.get(id)
                if row is None or time.time() - row.asked_at > ABANDONED_SECONDS:
                    return

    async def _follow(self, id: str, seen: int, quiet: float, seconds: float) -> tuple[bytes, int | None]:
        began = time.monotonic()
        while True:
            operation = self._owned.get(id)
            changed = operation.changed if operation is not None else None
            # While it is ours, it has no outcome: it is no longer ours once that is written down.
            found = self._requests.get(id) if operation is None else None
            if found is not None and (answer := found.outcome()) is not None:
                last = self._ended.get(id)
                if last is not None and last.version > seen:
                    return last.progress, last.version
                return answer, None
            waited = time.monotonic() - began
            version, told = max(seen, 1), False
            if operation is not None:
                version, told = operation.version, operation.told
            elif found is not None:
                version, told = found.version, bool(found.progress)
            elif waited > min(_BEGINNING_SECONDS, seconds):
                raise _unknown(id)
            news = told and version > seen
            if (news and waited >= quiet) or waited > seconds or self._draining.is_set():
                shown = operation or found
                return shown.progress if shown is not None else b"", version
            left = max(0.01, (min(quiet, seconds) if news else seconds) - waited)
            if changed is None:
                await asyncio.sleep(min(left, _PROGRESS_SECONDS))
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await changed.wait()


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancels a task and waits for its end; its exception stays with it."""
    if not task.done():
        task.cancel()
    await asyncio.wait({task})


def _unknown(id: str) -> ShoalError:
    return Aborted(f"request {id}: its outcome is no longer known", hint="ask again with a new id")
