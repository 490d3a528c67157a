"""What is kept of each container that has a desired status: a row, made with the label and dropped with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from shoal_bus import restart
from shoal_bus.database import Database, Transaction
from shoal_bus.message import Message, unpack
from shoal_bus.types import Mount, Stdio

from shoal_runtime.restart.decision import Look

_LOOK = """
SELECT restarts.*, containers.labels, tasks.request_id AS task, tasks.status, tasks.exit_status, tasks.exited_at
FROM restarts
JOIN containers ON containers.namespace = restarts.namespace AND containers.id = restarts.id
LEFT JOIN tasks ON tasks.namespace = restarts.namespace AND tasks.id = restarts.id AND tasks.exec_id = ''
LEFT JOIN runs ON runs.namespace = restarts.namespace AND runs.id = restarts.id
WHERE (runs.id IS NULL OR (runs.state = 'made' AND NOT runs.auto_remove))
"""


class Plan(Message):
    """What a start makes the task of, fixed before the task before it is gone."""

    rootfs: list[Mount] = []
    stdio: Stdio = Stdio()


def follow_labels(tx: Transaction, namespace: str, id: str, labels: Mapping[str, str]) -> None:
    """In the transaction that writes a container's labels: it has a row from now on, or has none."""
    if restart.STATUS in labels:
        tx.execute("INSERT OR IGNORE INTO restarts (namespace, id) VALUES (?, ?)", (namespace, id))
    else:
        forget(tx, namespace, id)


def forget(tx: Transaction, namespace: str, id: str) -> None:
    """In the transaction that removes a container: its row goes, too."""
    tx.execute("DELETE FROM restarts WHERE namespace = ? AND id = ?", (namespace, id))


class Rows:
    """The rows of every namespace. What is removed at its exit, or isn't whole yet, counts as having none."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def looks(self) -> Iterator[Look]:
        """Every container that has a desired status."""
        return map(_look, self._db.read(_LOOK))

    def look(self, namespace: str, id: str) -> Look | None:
        """One of them."""
        row = self._db.read_one(f"{_LOOK} AND restarts.namespace = ? AND restarts.id = ?", (namespace, id))
        return _look(row) if row is not None else None

    def plan(self, namespace: str, id: str, request_id: str) -> Plan | None:
        """What the start `request_id` makes, if it is the newest, and hasn't failed."""
        row = self._db.read_one(
            "SELECT plan FROM restarts WHERE namespace = ? AND id = ? AND request_id = ? AND failed_at = 0",
            (namespace, id, request_id),
        )
        return Plan.unpack(row["plan"]) if row is not None else None

    def earlier_plan(self, namespace: str, id: str) -> Plan | None:
        """What the start before this one made, or was to make."""
        row = self._db.read_one("SELECT plan FROM restarts WHERE namespace = ? AND id = ?", (namespace, id))
        return Plan.unpack(row["plan"]) if row is not None else None

    @staticmethod
    def begin(tx: Transaction, namespace: str, id: str, request_id: str, plan: Plan, pause: float) -> None:
        """Writes a start down, before its first effect."""
        tx.execute(
            "INSERT OR REPLACE INTO restarts (namespace, id, request_id, plan, pause, began_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (namespace, id, request_id, plan.pack(), pause, time.time()),
        )

    @staticmethod
    def fail(tx: Transaction, namespace: str, id: str) -> None:
        """Writes down that the newest start came to nothing."""
        tx.execute("UPDATE restarts SET failed_at = ? WHERE namespace = ? AND id = ?", (time.time(), namespace, id))

    def recovered(self, look: Look) -> None:
        """Forgets a start that came to nothing: somebody else's has come to something since."""
        with self._db.write() as tx:
            tx.execute(
                "UPDATE restarts SET failed_at = 0 WHERE namespace = ? AND id = ? AND request_id = ?",
                (look.namespace, look.id, look.latest),
            )

    @staticmethod
    def killed(tx: Transaction, namespace: str, id: str) -> None:
        """Writes down that a client asks for a signal now."""
        tx.execute("UPDATE restarts SET killed_at = ? WHERE namespace = ? AND id = ?", (time.time(), namespace, id))

    @staticmethod
    def hold(tx: Transaction, seconds: float) -> None:
        """Has all of them wait."""
        tx.execute("UPDATE restarts SET held_until = ?", (time.time() + seconds,))


def _look(row: Any) -> Look:
    stopped = row["status"] == "stopped"
    # A task that a start of ours has left behind unstarted, and couldn't remove, is nobody's: there is none.
    unstarted = row["status"] == "created" and row["task"] == row["request_id"]
    return Look(
        namespace=row["namespace"], id=row["id"], labels=unpack(row["labels"]), latest=row["request_id"],
        pause=row["pause"], began_at=row["began_at"], failed_at=row["failed_at"], killed_at=row["killed_at"],
        held_until=row["held_until"], task=row["task"] or "",
        status="" if unstarted else row["status"] or "",
        exit_status=row["exit_status"] or 0 if stopped else 0, exited_at=row["exited_at"] or 0.0 if stopped else 0.0,
    )  # fmt: skip
