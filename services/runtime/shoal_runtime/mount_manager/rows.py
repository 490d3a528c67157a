"""The rows of activations.

    making ──► made ──► removing ──► (gone)

One is written before the first mount is made, and goes after the last has been taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal_bus.api.runtime import Activation, ActiveMount
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.message import now, pack, unpack
from shoal_bus.types import Labels, Mount


class Rows:
    """Those of every namespace."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def find(self, namespace: str, name: str) -> Any | None:
        """The row of an activation, or None."""
        return self._db.read_one("SELECT * FROM mounts WHERE namespace = ? AND name = ?", (namespace, name))

    def page(self, namespace: str, after: str, length: int) -> list[Any]:
        """Those that are made, by name, `after` one."""
        return self._db.read(
            "SELECT * FROM mounts WHERE namespace = ? AND name > ? AND state = 'made' ORDER BY name LIMIT ?",
            (namespace, after, length),
        )

    def all(self) -> list[Any]:
        """Those of every namespace and state."""
        return self._db.read("SELECT * FROM mounts ORDER BY namespace, name")

    def begin(self, ctx: Context, name: str, place: str, lease: str, labels: Labels) -> None:
        """An activation is about to be made at a place."""
        at = now().timestamp()
        with self._db.write() as tx:
            ctx.begin(tx)
            tx.execute(
                "INSERT INTO mounts (namespace, name, request_id, place, state, lease, labels, created_at, updated_at)"
                " VALUES (?, ?, ?, ?, 'making', ?, ?, ?, ?)",
                (ctx.namespace, name, ctx.id, place, lease, pack(labels), at, at),
            )

    @staticmethod
    def made(
        tx: Transaction, namespace: str, name: str, active: Sequence[ActiveMount], system: Sequence[Mount]
    ) -> Activation:
        """It is made."""
        tx.execute(
            "UPDATE mounts SET state = 'made', active = ?, system = ? WHERE namespace = ? AND name = ?",
            (pack([one.model_dump() for one in active]), pack([one.model_dump() for one in system]), namespace, name),
        )
        found = tx.execute("SELECT * FROM mounts WHERE namespace = ? AND name = ?", (namespace, name)).fetchone()
        return activation_of(found)

    @staticmethod
    def relabel(tx: Transaction, namespace: str, name: str, labels: Labels) -> None:
        """Its labels are others from now on."""
        tx.execute(
            "UPDATE mounts SET labels = ?, updated_at = ?, stamped = 1 WHERE namespace = ? AND name = ?",
            (pack(labels), now().timestamp(), namespace, name),
        )

    def use(self, namespace: str, name: str) -> None:
        """A collection that is under way leaves it: it has come into use."""
        with self._db.write() as tx:
            tx.execute("UPDATE mounts SET stamped = 1 WHERE namespace = ? AND name = ?", (namespace, name))

    def remove(self, namespace: str, name: str, ctx: Context | None) -> None:
        """It is about to be taken away; `ctx` is the request whose work that is."""
        with self._db.write() as tx:
            if ctx is not None:
                ctx.begin(tx)
            tx.execute("UPDATE mounts SET state = 'removing' WHERE namespace = ? AND name = ?", (namespace, name))

    def drop(self, namespace: str, name: str) -> None:
        """It is gone."""
        with self._db.write() as tx:
            tx.execute("DELETE FROM mounts WHERE namespace = ? AND name = ?", (namespace, name))


def active_of(row: Any) -> list[ActiveMount]:
    """What a row says is mounted."""
    return [ActiveMount.of(one) for one in unpack(row["active"])]


def system_of(row: Any) -> list[Mount]:
    """What a row leaves to be mounted."""
    return [Mount.of(one) for one in unpack(row["system"])]


def activation_of(row: Any) -> Activation:
    """What a row says."""
    return Activation.of(
        {
            "name": row["name"], "active": unpack(row["active"]), "system": unpack(row["system"]),
            "labels": unpack(row["labels"]), "lease": row["lease"], "created_at": row["created_at"],
            "updated_at": row["updated_at"],
        }
    )  # fmt: skip
