"""The rows of processes: a task's first one, and its execs."""

from __future__ import annotations

from typing import Any

from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import NotFound
from shoal_bus.types import Stdio

from shoal_runtime.containers import Containers
from shoal_runtime.exits import Exits, exit_of


class Processes:
    """Those of every namespace; one without an exec's id is a task's first."""

    def __init__(self, database: Database, containers: Containers, exits: Exits) -> None:
        self._db, self._containers, self._exits = database, containers, exits

    def find(self, namespace: str, id: str, exec_id: str = "") -> Any | None:
        """The row of a process, by default of the first one, or None."""
        return self._db.read_one(
            "SELECT * FROM tasks WHERE namespace = ? AND id = ? AND exec_id = ?", (namespace, id, exec_id)
        )

    def require(self, namespace: str, id: str, exec_id: str = "") -> Any:
        """The row of a process, or NOT_FOUND, which says what isn't there: the exec, the task, or the container."""
        row = self.find(namespace, id, exec_id)
        if row is None:
            if exec_id and self.find(namespace, id) is not None:
                raise NotFound(f"container {id}: has no exec {exec_id}")
            self._containers.require(namespace, id)
            raise NotFound(f"container {id}: has no task")
        return row

    def is_begun(self, request_id: str) -> bool:
        """Whether a request is under way, or will be resumed. One that isn't has left what it couldn't undo."""
        return bool(self._db.read("SELECT 1 FROM requests WHERE id = ? AND state = 'begun'", (request_id,)))

    def set_start(self, ctx: Context, id: str, exec_id: str) -> None:
        """Writes down that a start is under way, before its first effect."""
        with self._db.write() as tx:
            ctx.begin(tx)
            tx.execute(
                "UPDATE tasks SET start_request = ? WHERE namespace = ? AND id = ? AND exec_id = ?",
                (ctx.id, ctx.namespace, id, exec_id),
            )

    def unstart(self, namespace: str, id: str, exec_id: str) -> None:
        """A start has failed: what waited for it to be told is told."""
        with self._db.write() as tx:
            tx.execute(
                "UPDATE tasks SET start_request = '' WHERE namespace = ? AND id = ? AND exec_id = ?",
                (namespace, id, exec_id),
            )
            exit = self._exits.settle(tx, namespace, id, exec_id)
        if exit is not None:
            self._exits.announce(namespace, exit)


def row_of(tx: Transaction, namespace: str, id: str) -> Any:
    """The row of a task's first process, as a transaction sees it."""
    return tx.execute("SELECT * FROM tasks WHERE namespace = ? AND id = ? AND exec_id = ''", (namespace, id)).fetchone()


def task_of(row: Any) -> api.Task:
    """What a row says of a process."""
    stopped = row["status"] == "stopped"
    return api.Task(
        container_id=row["id"], exec_id=row["exec_id"], pid=row["pid"], status=row["status"], bundle=row["bundle"],
        stdio=Stdio.unpack(row["stdio"]), exit_status=row["exit_status"] if stopped else 0,
        exited_at=exit_of(row).exited_at if stopped else None,
    )  # fmt: skip
