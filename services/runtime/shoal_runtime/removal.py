"""Removes containers with everything that was made for them: asked for, after a run that failed, or at their exit.

The row of a run comes before the first thing it makes and goes after the last, so whatever isn't done yet is found in
the database: by the request that is resumed, or by the sweep that every copy makes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import FailedPrecondition, NotFound, ShoalError
from shoal_bus.locks import Locks
from shoal_bus.message import Empty

from shoal_runtime.containers import Containers
from shoal_runtime.plan import Made, RunPlan
from shoal_runtime.tasks import Tasks

log = structlog.get_logger(__name__)

_Key = tuple[str, str, str]
"""Namespace, container and, where it is one, exec."""

_SWEEP_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_AT_ONCE = 16

_DUE = """
SELECT runs.namespace, runs.id, runs.state FROM runs
LEFT JOIN tasks ON tasks.namespace = runs.namespace AND tasks.id = runs.id AND tasks.exec_id = ''
WHERE (runs.state != 'made' OR (runs.auto_remove AND (tasks.status IS NULL OR tasks.status = 'stopped')))
AND NOT EXISTS (SELECT 1 FROM requests WHERE requests.id = runs.request_id AND requests.state = 'begun')
"""
_DUE_EXECS = "SELECT namespace, id, exec_id FROM tasks WHERE auto_remove AND status = 'stopped'"


def lock_of(id: str) -> str:
    """The lock of everything that changes one container."""
    return f"container/{id}"


def lock_of_process(id: str, exec_id: str) -> str:
    """The lock of what is done to one process. Execs have their own: many are started at once, and none waits."""
    return lock_of(f"{id}/exec/{exec_id}" if exec_id else id)


def lock_key(namespace: str, id: str, exec_id: str = "") -> str:
    """The same locks, as the harness names them among those of all namespaces."""
    return f"{namespace} {lock_of_process(id, exec_id)}"


class Removal:
    """The end of containers. `client_of` gives a client for a namespace."""

    def __init__(
        self, database: Database, locks: Locks, containers: Containers, tasks: Tasks, client_of: Callable[[str], Client]
    ) -> None:
        self._db, self._locks, self._containers, self._tasks = database, locks, containers, tasks
        self._processes = tasks.processes
        self._client_of = client_of
        self._wake = asyncio.Event()
        self._busy: dict[_Key, asyncio.Task[None]] = {}
        self._pauses: dict[_Key, tuple[float, float]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)

    def plan_of(self, namespace: str, id: str) -> RunPlan | None:
        """What a run made, or is making, under this name."""
        row = self._db.read_one("SELECT plan FROM runs WHERE namespace = ? AND id = ?", (namespace, id))
        return RunPlan.unpack(row["plan"]) if row is not None else None

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def remove(self, ctx: Context, request: api.RemoveContainer) -> Empty:
        row = self._processes.find(ctx.namespace, request.id)
        known = self.plan_of(ctx.namespace, request.id) or self._containers.find(ctx.namespace, request.id) or row
        if known is None and not ctx.resumed:
            raise NotFound(f"container {request.id}: not found")
        if row is not None and row["status"] in ("running", "paused") and not request.force and not ctx.resumed:
            raise FailedPrecondition(f"container {request.id}: is running", hint="stop it first, or force its removal")
        await self.carry_out(ctx.namespace, request.id)
        return Empty()

    async def carry_out(self, namespace: str, id: str) -> None:
        """Removes whatever there is of a container; its lock is held. What fails is tried again by the sweep."""
        row = self._db.read_one("SELECT state, plan FROM runs WHERE namespace = ? AND id = ?", (namespace, id))
        unfinished = row is not None and row["state"] == "making"
        if row is not None and row["state"] == "made":
            self._set_state(namespace, id, "removing")
        await self._end_task(namespace, id)
        with self._db.write() as tx:
            self._containers.drop(tx, namespace, id)
        if row is None:
            return
        made = Made(self._client_of(namespace), RunPlan.unpack(row["plan"]))
        if unfinished:
            await made.undo_network()
            await made.undo_snapshot()
        else:
            await made.remove_network()
            await made.remove_snapshot()
        with self._db.write() as tx:
            tx.execute("DELETE FROM runs WHERE namespace = ? AND id = ?", (namespace, id))

    async def _end_task(self, namespace: str, id: str) -> None:
        row = self._processes.find(namespace, id)
        if row is None:
            return
        if row["status"] == "creating":
            await self._tasks.undo_creation(namespace, id)
        else:
            await self._tasks.end(namespace, id, keep=True)

    def _set_state(self, namespace: str, id: str, state: str) -> None:
        with self._db.write() as tx:
            tx.execute("UPDATE runs SET state = ? WHERE namespace = ? AND id = ?", (state, namespace, id))

    # -------------------------------------------------------------------------------------------------------- the sweep

    def wake(self) -> None:
        """Has the sweep look now: something has exited."""
        self._wake.set()

    async def sweep_for_ever(self) -> None:
        """Removes what is due: runs and execs to be removed at their exit, and what a run or a removal left undone."""
        while True:
            try:
                self._sweep()
            except Exception:
                log.exception("removal.sweep_failed")
            self._wake.clear()
            try:
                async with asyncio.timeout(_SWEEP_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """Leaves what is under way to the next copy."""
        tasks = list(self._busy.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        due: list[_Key] = [(row["namespace"], row["id"], "") for row in self._db.read(_DUE)]
        due += [(row["namespace"], row["id"], row["exec_id"]) for row in self._db.read(_DUE_EXECS)]
        for key in due:
            if key in self._busy or self._pauses.get(key, (0.0, 0.0))[0] > now:
                continue
            task = asyncio.create_task(self._remove_due(*key))
            self._busy[key] = task
            task.add_done_callback(partial(self._no_longer_busy, key))

    def _no_longer_busy(self, key: _Key, _: asyncio.Task[None]) -> None:
        self._busy.pop(key, None)

    async def _remove_due(self, namespace: str, id: str, exec_id: str) -> None:
        key, lock = (namespace, id, exec_id), lock_key(namespace, id, exec_id)
        async with self._slots:
            if not self._locks.try_acquire(lock):
                return  # somebody is at work on it; the next sweep looks again
            try:
                if exec_id:
                    with suppress(NotFound):  # its container has been removed meanwhile, or it has
                        await self._tasks.execs.remove(namespace, id, exec_id)
                elif any((row["namespace"], row["id"]) == key[:2] for row in self._db.read(_DUE)):
                    await self.carry_out(namespace, id)
                    log.info("container.removed", namespace=namespace, container=id)
                self._pauses.pop(key, None)
            except Exception as error:
                pause = min(max(1.0, self._pauses.get(key, (0.0, 0.0))[1] * 2), _LONGEST_PAUSE_SECONDS)
                self._pauses[key] = (asyncio.get_running_loop().time() + pause, pause)
                expected = isinstance(error, ShoalError)
                log.warning(
                    "container.removal_failed", namespace=namespace, container=id, exec=exec_id, again_in=pause,
                    error=str(error), exc_info=not expected,
                )  # fmt: skip
            finally:
                self._locks.release(lock)
