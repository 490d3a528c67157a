"""The controller of sandboxes: from when one is made ready for its containers until it is stopped, and they with it.

    created ──► ready ──► stopped ──► (forgotten)
       └────────────────────►┘

There is no process behind a sandbox; its containers share a shim (`groups`). Exits are told once, by whoever stops it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database, Row, Transaction
from shoal_bus.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound
from shoal_bus.message import Empty, Message, now, pack, unpack

from shoal_runtime.containers import Containers
from shoal_runtime.exits import Exits
from shoal_runtime.groups import group_of

_LOOK_AGAIN_SECONDS = 1.0
_KILL_SECONDS = 20.0
"""How long what was killed may take to be gone."""
_TERM, _KILL = 15, 9


def lock_of(id: str) -> str:
    """The lock of everything that changes one sandbox."""
    return f"sandbox/{id}"


class SandboxStopped(Message):
    """What the copies of the service tell one another of a sandbox's end."""

    namespace: str
    status: api.SandboxStatus


class SandboxController:
    """The sandboxes that run, in every namespace. `tell` passes an end on to the other copies of the service."""

    def __init__(
        self, database: Database, containers: Containers, exits: Exits, tell: Callable[[SandboxStopped], None]
    ) -> None:
        self._db, self._containers, self._exits, self._tell = database, containers, exits, tell
        self._waiting: dict[tuple[str, str], set[asyncio.Future[api.SandboxStatus]]] = {}

    def wake(self, stopped: SandboxStopped) -> None:
        """Gives an end to who waits for it in this copy."""
        for future in self._waiting.pop((stopped.namespace, stopped.status.id), ()):
            if not future.done():
                future.set_result(stopped.status)

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def run(self, ctx: Context, request: api.RunSandbox) -> api.SandboxStatus:
        key = (ctx.namespace, request.id)
        with self._db.write() as tx:
            if _find(tx, *key) is not None:
                raise AlreadyExists(f"sandbox {request.id}: its controller has it already")
            tx.execute(
                "INSERT INTO running_sandboxes (namespace, id, sandboxer, netns_path, annotations, state, created_at)"
                " VALUES (?, ?, ?, ?, ?, 'created', ?)",
                (*key, request.sandboxer, request.netns_path, pack(request.annotations), time.time()),
            )
            tx.emit(ctx.namespace, api.SANDBOXES_CREATE, api.SandboxCreated(sandbox_id=request.id))
            made = _status(_found(tx, *key))
            ctx.answer(tx, made)
        return made

    async def start(self, ctx: Context, request: api.SandboxRequest) -> api.SandboxStatus:
        key = (ctx.namespace, request.id)
        with self._db.write() as tx:
            row = _found(tx, *key)
            if row["state"] != "created":
                raise FailedPrecondition(f"sandbox {request.id}: is {row['state']}, and can't be started")
            tx.execute(
                "UPDATE running_sandboxes SET state = 'ready', started_at = ? WHERE namespace = ? AND id = ?",
                (time.time(), *key),
            )
            tx.emit(ctx.namespace, api.SANDBOXES_START, api.SandboxStarted(sandbox_id=request.id))
            started = _status(_found(tx, *key))
            ctx.answer(tx, started)
        return started

    async def status(self, ctx: Context, request: api.SandboxRequest) -> api.SandboxStatus:
        return _status(self._require(ctx.namespace, request.id))

    async def stop(self, ctx: Context, request: api.StopSandbox) -> api.SandboxStatus:
        """Stopping one that is stopped says how it ended. FAILED_PRECONDITION names containers that don't end."""
        key = (ctx.namespace, request.id)
        row = self._require(*key)
        if row["state"] == "stopped":
            return _status(row)
        await self._end_containers(ctx, request)
        with self._db.write() as tx:
            at = now()
            tx.execute(
                "UPDATE running_sandboxes SET state = 'stopped', exited_at = ? WHERE namespace = ? AND id = ?",
                (at.timestamp(), *key),
            )
            exited = api.SandboxExited(sandbox_id=request.id, exit_status=0, exited_at=at)
            tx.emit(ctx.namespace, api.SANDBOXES_EXIT, exited)
            stopped = _status(_found(tx, *key))
            ctx.answer(tx, stopped)
        told = SandboxStopped(namespace=ctx.namespace, status=stopped)
        self.wake(told)
        self._tell(told)
        return stopped

    async def undo_stop(self, ctx: Context, request: api.StopSandbox) -> None:
        """Nothing: who was signalled can't be brought back, and the sandbox is what it was until it is stopped."""

    async def wait(self, ctx: Context, request: api.SandboxRequest) -> api.SandboxStatus:
        key = (ctx.namespace, request.id)
        while True:
            row = self._require(*key)
            if row["state"] == "stopped":
                return _status(row)
            future: asyncio.Future[api.SandboxStatus] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(key, set()).add(future)
            try:
                async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                    return await future
            except TimeoutError:
                continue
            finally:
                waiting = self._waiting.get(key, set())
                waiting.discard(future)
                if not waiting:
                    self._waiting.pop(key, None)

    async def shutdown(self, ctx: Context, request: api.SandboxRequest) -> Empty:
        key = (ctx.namespace, request.id)
        with self._db.write() as tx:
            row = _found(tx, *key)
            if row["state"] == "ready":
                raise FailedPrecondition(f"sandbox {request.id}: runs", hint="stop it first")
            tx.execute("DELETE FROM running_sandboxes WHERE namespace = ? AND id = ?", key)
            ctx.answer(tx, Empty())
        return Empty()

    # ------------------------------------------------------------------------------------------------- its containers

    async def _end_containers(self, ctx: Context, request: api.StopSandbox) -> None:
        if request.timeout:
            await self._gone(ctx.namespace, await self._signal(ctx, request.id, _TERM), request.timeout)
        await self._gone(ctx.namespace, await self._signal(ctx, request.id, _KILL), _KILL_SECONDS)
        left = self._alive(ctx.namespace, request.id)
        if left:
            raise FailedPrecondition(f"sandbox {request.id}: its containers {', '.join(left)} don't end")

    async def _signal(self, ctx: Context, id: str, signal: int) -> list[str]:
        """Signals the sandbox's containers, SIGKILL every process of theirs. Returns which there are."""
        containers = self._alive(ctx.namespace, id)
        for container in containers:
            asked = api.KillTask(container_id=container, signal=signal, all=signal == _KILL)
            try:
                await ctx.call(api.TASK_KILL, asked, step=f"{container}.{signal}")
            except (NotFound, FailedPrecondition, Aborted) as error:  # it may have ended meanwhile
                ctx.log.info("sandbox.not_signalled", sandbox=id, container=container, error=str(error))
        return containers

    async def _gone(self, namespace: str, containers: Sequence[str], seconds: float) -> None:
        """Waits until they have ended, or the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for container in containers:
                    with suppress(NotFound):
                        await self._exits.wait(namespace, container)

    def _alive(self, namespace: str, id: str) -> list[str]:
        """Which containers of a sandbox have a task that has begun, and hasn't ended."""
        rows = self._db.read(
            "SELECT id FROM tasks WHERE namespace = ? AND exec_id = '' AND status NOT IN ('creating', 'stopped')",
            (namespace,),
        )
        found = [self._containers.find(namespace, row["id"]) for row in rows]
        return [one.id for one in found if one is not None and id in (one.sandbox, group_of(one.spec))]

    def _require(self, namespace: str, id: str) -> Row:
        row = self._db.read_one("SELECT * FROM running_sandboxes WHERE namespace = ? AND id = ?", (namespace, id))
        return _there(row, id)


def _find(tx: Transaction, namespace: str, id: str) -> Row | None:
    row: Row | None = tx.execute(
        "SELECT * FROM running_sandboxes WHERE namespace = ? AND id = ?", (namespace, id)
    ).fetchone()
    return row


def _found(tx: Transaction, namespace: str, id: str) -> Row:
    return _there(_find(tx, namespace, id), id)


def _there(row: Row | None, id: str) -> Row:
    if row is None:
        raise NotFound(f"sandbox {id}: no controller has it")
    return row


def _status(row: Row) -> api.SandboxStatus:
    def at(name: str) -> datetime | None:
        return datetime.fromtimestamp(row[name], UTC) if row[name] is not None else None

    return api.SandboxStatus(
        id=row["id"], sandboxer=row["sandboxer"], state=row["state"], netns_path=row["netns_path"],
        annotations=unpack(row["annotations"]), created_at=datetime.fromtimestamp(row["created_at"], UTC),
        started_at=at("started_at"), exited_at=at("exited_at"), exit_status=row["exit_status"],
    )  # fmt: skip
