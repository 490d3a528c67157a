"""At start: the tasks in the database against the shims that are there. Says what it mended.

Only what no living copy is at work on is touched: each container's lock is tried, and held meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from shoal_bus.database import Database
from shoal_bus.errors import NotFound
from shoal_bus.locks import Locks
from shoal_bus.message import now

from shoal_runtime.bundles import Bundles
from shoal_runtime.exits import KILLED, Exits
from shoal_runtime.removal import lock_key
from shoal_runtime.shims import ExitRecord, Found
from shoal_runtime.supervisor import Supervisor
from shoal_runtime.tasks import Tasks

log = structlog.get_logger(__name__)


class Reconciliation:
    """One look at everything, when a copy of the service starts."""

    def __init__(
        self, database: Database, locks: Locks, supervisor: Supervisor, tasks: Tasks, exits: Exits, bundles: Bundles
    ) -> None:
        self._db, self._locks, self._supervisor = database, locks, supervisor
        self._tasks, self._exits, self._bundles = tasks, exits, bundles
        self._processes = tasks.processes

    async def run(self, found: Sequence[Found]) -> None:
        """Mends what differs. `found` is what `Supervisor.start` saw; exits it heard of are recorded already."""
        shims = {(one.namespace, one.id) for one in found}
        rows = {(row["namespace"], row["id"]) for row in self._db.read("SELECT DISTINCT namespace, id FROM tasks")}
        for key in sorted(rows | shims | set(self._bundles.all())):
            lock = lock_key(*key)
            if not self._locks.try_acquire(lock):
                continue
            try:
                await self._mend(*key)
            except Exception:
                log.exception("reconcile.failed", namespace=key[0], container=key[1])
            finally:
                self._locks.release(lock)

    async def _mend(self, namespace: str, id: str) -> None:
        row = self._processes.find(namespace, id)
        if row is None:
            await self._remove_stray(namespace, id)
        elif row["status"] == "creating":
            if not self._processes.is_begun(row["request_id"]):
                await self._tasks.undo_creation(namespace, id)
                log.warning("task.undone", namespace=namespace, container=id, reason="its creation wasn't finished")
        elif row["status"] != "stopped" and not await self._is_supervised(namespace, id):
            row = self._processes.find(namespace, id)
            if row is None or row["status"] == "stopped":
                return  # its shim was dead, and how it ended has just been found out
            # After a reboot, say. A start that was under way is finished by its request, which finds no shim either.
            for exec_id, pid in self._tasks.execs.running(namespace, id):
                self._exits.heard(ExitRecord(namespace, id, pid, KILLED, now(), exec_id))
            lost = ExitRecord(namespace, id, row["pid"], KILLED, now())
            if not (
                row["start_request"] and row["status"] == "created" and self._processes.is_begun(row["start_request"])
            ):
                self._exits.heard(lost)
            await asyncio.to_thread(self._bundles.remove, namespace, id)
            log.warning("task.lost", namespace=namespace, container=id, exit_status=KILLED)

    async def _remove_stray(self, namespace: str, id: str) -> None:
        if await self._supervisor.delete(namespace, id, force=True) is not None:
            log.warning("shim.stray_removed", namespace=namespace, container=id)
        if self._bundles.path(namespace, id).exists():
            await asyncio.to_thread(self._bundles.remove, namespace, id)
            log.warning("bundle.stray_removed", namespace=namespace, container=id)

    async def _is_supervised(self, namespace: str, id: str) -> bool:
        try:
            await self._supervisor.state(namespace, id)
        except NotFound:
            return False
        return True
