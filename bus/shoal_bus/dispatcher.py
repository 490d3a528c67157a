"""The dispatcher: carries out a node's durable commands, each once, in order per container, and tells how each ended.

    async with dispatching(process):
        …

One works per node, however many processes host one: whoever holds its lock, which dies with its holder. It calls the
services as any client does, under the command's own id: what a dispatcher began that was killed in the middle is asked
again by the next one, and done once by the service. The outcome and its event are one transaction of a database of its
own (an outbox); the command is acknowledged behind that, and a redelivery of one that has an outcome is acknowledged
again and no more.

What isn't acknowledged is delivered again, in order, whenever a dispatcher begins and whenever the bus was away
(`CommandQueue`); what it holds already it knows by its place in the stream.

A command waits as long as its service isn't there, or until it expires. Expiry is looked at before it is handed to the
service: one that may have been handed over is asked after until there is an outcome. Where a service answers that it
can't (UNAVAILABLE, ABORTED, no answer in time), it is tried `ATTEMPTS` times; what ends a dispatcher that often is no
command that any other should try, and fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import nats.errors
import nats.js.errors
import structlog
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from shoal_bus import streams, subjects
from shoal_bus.api import commands as api
from shoal_bus.client import Unreached
from shoal_bus.clock import ServerClock
from shoal_bus.command_queue import HELD, CommandQueue
from shoal_bus.commands import Command, Verbs, read
from shoal_bus.database import Database
from shoal_bus.errors import Code, Internal, InvalidArgument, ShoalError, Unavailable, from_exception
from shoal_bus.events import Topic
from shoal_bus.harness import Service
from shoal_bus.locks import Locks
from shoal_bus.message import Message, pack
from shoal_bus.process import Process
from shoal_bus.pull import Silent
from shoal_bus.reference import modules
from shoal_bus.verb import AnyVerb, OperationVerb, Verb, verbs_of

log = structlog.get_logger(__name__)

LOCK = "dispatcher"
AT_ONCE = 64
"""Commands under way at once, each of another container."""
HELD_BYTES = 64 << 20
"""Bytes of commands taken and not yet acknowledged; the next ones stay in the stream."""
ATTEMPTS = 10
KEEP_SECONDS = 3600.0
"""How long an outcome is kept after its command's acknowledgement, which a server may lose with its last minutes."""
LARGEST_REPLY = 256 * 1024
_CALL_SECONDS = 60.0
_AWAY_SECONDS = 0.5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
_PRUNE_SECONDS = 60.0
_RETRIED = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.ABORTED})
_TROUBLE = (TimeoutError, nats.errors.Error, nats.js.errors.Error, OSError, Silent, Unavailable)

_TOPICS: dict[type[Message], Topic[Any]] = {topic.payload: topic for topic in (api.DONE, api.FAILED, api.EXPIRED)}

MIGRATIONS = [
    """
CREATE TABLE commands (
    id       TEXT NOT NULL,
    hash     BLOB NOT NULL,       -- tells another command under the same id from this one
    state    TEXT NOT NULL,       -- handed (a service may have begun it), done, failed, expired
    attempts INTEGER NOT NULL,
    round    INTEGER NOT NULL,    -- how often it had to be begun under a new id
    ended_at REAL,
    acked_at REAL,
    PRIMARY KEY (id, hash)
) WITHOUT ROWID;
CREATE INDEX commands_acked ON commands (acked_at) WHERE acked_at IS NOT NULL;
"""
]


@asynccontextmanager
async def dispatching(process: Process, verbs: Iterable[AnyVerb] | None = None) -> AsyncIterator[None]:
    """Hosts a dispatcher of the node's commands in `process` for a block; it works when it is its turn.

    It is a service of its own on the bus, `commands`, with a database and an outbox of its own. `verbs` are those it
    knows: all of shoal's where nothing is said.
    """
    own = Process(api.SERVICE, process.node, process.connection, process.stack, process.args, process.stop)
    database = own.database(MIGRATIONS)
    service = own.service("durable commands, carried out")
    known = Verbs(verbs if verbs is not None else [verb for module in modules() for verb in verbs_of(module)])
    service.background(Dispatcher(service, database, own.locks, known, domain=process.node.domain).run(), LOCK)
    await service.start()
    try:
        yield
    finally:
        await service.drain()


@dataclass
class _Held:
    """A command between its delivery and its acknowledgement."""

    command: Command
    place: tuple[int, datetime]
    ack: str


@dataclass
class _Progress:
    """How far a command is."""

    attempts: int = 0
    round: int = 0
    """How often it had to be begun under a new id."""
    handed: bool = False
    """A service may have begun it: it doesn't expire any more."""
    resumed: bool = False
    """Another dispatcher handed it over."""
    pause: float = 0.0


class Dispatcher:
    """Carries out one node's commands, whenever it is this copy's turn."""

    def __init__(self, service: Service, database: Database, locks: Locks, verbs: Verbs, *, domain: str = "") -> None:
        self._client, self._connection = service.client, service.connection
        self._db, self._locks, self._verbs = database, locks, verbs
        self._js = JetStreamContext(service.connection, domain=domain or None)
        self._queue = CommandQueue(self._js, service.connection, service.node)
        self._clock = ServerClock(service.connection, streams.COMMANDS, domain=domain)
        self._held: dict[tuple[int, datetime], _Held] = {}
        self._bytes = 0
        self._chains: dict[tuple[str, str], deque[_Held]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._away: dict[str, float] = {}
        """Services that weren't there, and until when nobody need look again."""
        self._room, self._unconfirmed = asyncio.Event(), False

    async def run(self) -> None:
        """Takes its turn, and dispatches for ever; cancelled at the end. What is under way then is left to the next."""
        await self._locks.acquire(LOCK)
        try:
            await self._dispatch_for_ever()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._queue.close()
            self._locks.release(LOCK)

    # ------------------------------------------------------------------------------------------------- from the stream

    async def _dispatch_for_ever(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            await self._connection.up.wait()
            try:
                self._unconfirmed = False
                await self._connection.while_up(self._queue.renew())
                pause = _FIRST_PAUSE
                await self._take_all()
            except Exception as error:
                known = isinstance(error, _TROUBLE)
                level = logging.INFO if known else logging.ERROR
                log.log(level, "commands.resuming", error=f"{type(error).__name__}: {error}", exc_info=not known)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    async def _take_all(self) -> None:
        """Takes what is delivered, until an acknowledgement isn't confirmed: then it has to be delivered again."""
        pruned = time.monotonic()
        while not self._unconfirmed:
            while len(self._held) >= HELD or self._bytes >= HELD_BYTES:
                self._room.clear()
                await self._connection.while_up(self._wait_for_room())
            for message in await self._connection.while_up(self._queue.next()):
                self._take(message)
            if time.monotonic() - pruned > _PRUNE_SECONDS:
                pruned = time.monotonic()
                self._prune()

    async def _wait_for_room(self) -> None:
        await self._room.wait()

    def _take(self, message: Msg) -> None:
        metadata = message.metadata
        place = (metadata.sequence.stream, metadata.timestamp)
        held = self._held.get(place)
        if held is not None:
            held.ack = message.reply
            return
        held = self._held[place] = _Held(read(message, self._verbs), place, message.reply)
        self._bytes += held.command.size
        order = held.command.order
        if order in self._chains:
            self._chains[order].append(held)
            return
        self._chains[order] = deque([held])
        task = asyncio.create_task(self._work_off(order))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work_off(self, order: tuple[str, str]) -> None:
        """Carries out a container's commands, one after another."""
        chain = self._chains[order]
        pause = _FIRST_PAUSE
        while chain:
            held = chain[0]
            try:
                await self._carry_out(held)
            except Exception as error:
                # Our own trouble, as a full disk: the command isn't to blame, and those behind it wait for it.
                known = isinstance(error, _TROUBLE)
                told = f"{type(error).__name__}: {error}"
                log.warning("command.delayed", command=held.command.id, error=told, seconds=pause, exc_info=not known)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            pause = _FIRST_PAUSE
            chain.popleft()
            del self._held[held.place]
            self._bytes -= held.command.size
            self._room.set()
        del self._chains[order]

    # ------------------------------------------------------------------------------------------------------- carry out

    async def _carry_out(self, held: _Held) -> None:
        """One command from its delivery to its acknowledgement."""
        command = held.command
        state, progress = self._found(command)
        if state in ("", "handed"):
            self._end(command, self._refused(command) or await self._outcome(command, progress))
        await self._acknowledge(held)

    def _refused(self, command: Command) -> Message | None:
        if command.refusal is not None:
            return _failed(command, command.refusal)
        if self._db.read_one("SELECT 1 FROM commands WHERE id = ? AND hash != ?", (command.id, command.hash)):
            error = InvalidArgument(f"command id {command.id}: already used for another one", hint="ids are for one")
            return _failed(command, error)
        return None

    async def _outcome(self, command: Command, progress: _Progress) -> Message:
        """How the command ends: an event's payload. Waits for its service, and tries again where that helps."""
        while True:
            await self._connection.up.wait()
            async with self._slots:
                outcome = await self._try(command, progress)
            if outcome is not None:
                return outcome
            await asyncio.sleep(progress.pause)

    async def _is_late(self, command: Command) -> bool:
        if command.expires is None:
            return False
        return (await self._clock.now() - command.submitted).total_seconds() > command.expires

    async def _try(self, command: Command, progress: _Progress) -> Message | None:
        """One look at a command whose turn it is: how it ended, or None where it is to be tried again."""
        if not progress.handed and await self._is_late(command):
            return _expired(command)
        if progress.attempts >= ATTEMPTS:
            return _failed(command, Internal(f"command {command.id}: begun {progress.attempts} times, and never ended"))
        resource = command.name.rpartition(".")[0]
        progress.pause = _AWAY_SECONDS
        if time.monotonic() < self._away.get(resource, 0.0):
            return None
        before, generation = replace(progress), self._connection.generation
        progress.handed, progress.attempts = True, progress.attempts + 1
        self._save(command, progress)
        try:
            outcome = _done(command, await self._ask(command, progress))
        except asyncio.CancelledError:
            self._save(command, replace(before, handed=True))  # a dispatcher that stops isn't the command's fault
            raise
        except Unreached:
            self._save(command, before)
            progress.handed, progress.attempts = before.handed, before.attempts
            self._away[resource] = time.monotonic() + _AWAY_SECONDS
            return None
        except Exception as raised:
            if not isinstance(raised, ShoalError):
                log.exception("command.raised", command=command.id, verb=command.name)
            return self._judge(command, progress, from_exception(raised), generation)
        self._away.pop(resource, None)
        return outcome

    def _judge(self, command: Command, progress: _Progress, error: ShoalError, generation: int) -> Message | None:
        """What follows from an error: the command's end, or None where it is to be tried again."""
        lost = generation != self._connection.generation
        if error.code is Code.CANCELLED and (lost or progress.resumed):
            # While nobody could ask after it, its service has undone it: it is begun anew.
            progress.round += 1
        elif error.code not in _RETRIED or (progress.attempts >= ATTEMPTS and not lost):
            return _failed(command, error)
        if lost:
            progress.attempts -= 1  # the bus was lost: that wasn't an attempt
        progress.pause = min(_FIRST_PAUSE * 2**progress.attempts, _LONGEST_PAUSE)
        log.info("command.again", command=command.id, verb=command.name, error=str(error), seconds=progress.pause)
        return None

    async def _ask(self, command: Command, progress: _Progress) -> Message:
        verb, request = command.verb, command.request
        assert request is not None
        client = self._client.with_namespace(command.namespace)
        id = f"{command.id}.{progress.round}" if progress.round else command.id
        reply: Message
        if isinstance(verb, OperationVerb):
            reply = await client.operate(verb, request, id=id, patience=0, trace=command.trace, detached=True)
        else:
            assert isinstance(verb, Verb)
            reply = await client.call(verb, request, id=id, timeout=_CALL_SECONDS, patience=0, trace=command.trace)
        return reply

    async def _acknowledge(self, held: _Held) -> None:
        """Has the server forget the command. Where it doesn't confirm that, it delivers it again."""
        try:
            await self._queue.acknowledge(held.ack)
        except _TROUBLE as error:
            self._unconfirmed = True
            log.info("command.unconfirmed", command=held.command.id, error=f"{type(error).__name__}: {error}")
            return
        with self._db.write() as tx:
            tx.execute(
                "UPDATE commands SET acked_at = ? WHERE id = ? AND hash = ?",
                (time.time(), held.command.id, held.command.hash),
            )

    # -------------------------------------------------------------------------------------------------------- database

    def _found(self, command: Command) -> tuple[str, _Progress]:
        """A command's state, empty where it is new, and how far it is."""
        row = self._db.read_one(
            "SELECT state, attempts, round FROM commands WHERE id = ? AND hash = ?", (command.id, command.hash)
        )
        if row is None:
            return "", _Progress()
        return row["state"], _Progress(row["attempts"], row["round"], handed=True, resumed=True)

    def _save(self, command: Command, progress: _Progress) -> None:
        """Writes down whether a service may have begun it."""
        key = (command.id, command.hash)
        with self._db.write() as tx:
            tx.execute("DELETE FROM commands WHERE id = ? AND hash = ?", key)
            if progress.handed:
                tx.execute(
                    "INSERT INTO commands (id, hash, state, attempts, round) VALUES (?, ?, 'handed', ?, ?)",
                    (*key, progress.attempts, progress.round),
                )

    def _end(self, command: Command, outcome: Message) -> None:
        """Records the outcome and its event. Durable: after the acknowledgement nobody else knows of the command."""
        topic = _TOPICS[type(outcome)]
        state = topic.name.rpartition("/")[2]
        with self._db.write(durable=True) as tx:
            tx.execute(
                "INSERT INTO commands (id, hash, state, attempts, round, ended_at) VALUES (?, ?, ?, 0, 0, ?)"
                " ON CONFLICT (id, hash) DO UPDATE SET state = excluded.state, ended_at = excluded.ended_at",
                (command.id, command.hash, state, time.time()),
            )
            tx.emit(command.namespace, topic, outcome)
        log.info(f"command.{state}", command=command.id, verb=command.name, namespace=_shown(command))

    def _prune(self) -> None:
        with self._db.write() as tx:
            tx.execute("DELETE FROM commands WHERE acked_at < ?", (time.time() - KEEP_SECONDS,))


def _shown(command: Command) -> str:
    return "" if command.namespace == subjects.WHOLE_NODE else command.namespace


def _done(command: Command, reply: Message) -> api.CommandDone:
    told = reply.model_dump(exclude_none=True)
    large = len(pack(told)) > LARGEST_REPLY
    return api.CommandDone(
        id=command.id, verb=command.name, namespace=_shown(command), reply={} if large else told, reply_left_out=large
    )


def _expired(command: Command) -> api.CommandExpired:
    return api.CommandExpired(
        id=command.id, verb=command.name, namespace=_shown(command),
        submitted_at=command.submitted, expires=command.expires or 0.0,
    )  # fmt: skip


def _failed(command: Command, error: ShoalError) -> api.CommandFailed:
    return api.CommandFailed(
        id=command.id, verb=command.name, namespace=_shown(command),
        code=error.code.name, message=error.message, hint=error.hint,
    )  # fmt: skip
