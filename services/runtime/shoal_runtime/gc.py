"""What containers hold, for garbage collection: their snapshots, and what their labels refer to.

So do runs that aren't containers yet: their plan is in a row before they ask for a snapshot. A sandbox holds what its
labels refer to. What stops being held within an epoch is kept by triggers (`schema`) until the epoch is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from shoal_bus.api import snapshot
from shoal_bus.collection import Epoch, Holder, Opened, of_collection
from shoal_bus.context import Context
from shoal_bus.database import Database, Row
from shoal_bus.errors import Aborted
from shoal_bus.message import Empty, unpack

from shoal_runtime.mount_manager.collecting import open_epoch
from shoal_runtime.plan import RunPlan


class Collection:
    """This service's part in garbage collection."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def open(self, ctx: Context, request: Epoch) -> Opened:
        """Opens an epoch; one that was left open ends with it."""
        with self._db.write() as tx:
            tx.execute("DELETE FROM collection_kept")
            tx.execute("UPDATE collection SET token = ?, open = 1", (request.token,))
            open_epoch(tx)
            opened = Opened()
            ctx.answer(tx, opened)
        return opened

    async def close(self, ctx: Context, request: Epoch) -> Empty:
        """Closes an epoch, if it is still that one."""
        with self._db.write() as tx:
            if tx.execute("UPDATE collection SET open = 0 WHERE token = ? AND open", (request.token,)).rowcount:
                tx.execute("DELETE FROM collection_kept")
            ctx.answer(tx, Empty())
        return Empty()

    async def holders(self, ctx: Context, request: Epoch) -> AsyncIterator[Holder]:
        """Everything that was held at some time since the epoch was opened. ABORTED where it is no longer open."""
        # Who stops holding meanwhile is kept, so what is kept comes last.
        for sql in (_RUNS, _CONTAINERS, _SANDBOXES, _KEPT):
            for row in self._db.read(sql):
                yield _run(row) if sql is _RUNS else _container(row)
        if self._db.read_one("SELECT 1 FROM collection WHERE token = ? AND open", (request.token,)) is None:
            raise Aborted("this collection's epoch is no longer open")


_RUNS = "SELECT namespace, id, plan FROM runs"
_CONTAINERS = "SELECT namespace, id, snapshotter, snapshot_key, labels FROM containers"
_SANDBOXES = "SELECT namespace, id, '' AS snapshotter, '' AS snapshot_key, labels FROM sandboxes"
_KEPT = "SELECT namespace, id, snapshotter, snapshot_key, labels FROM collection_kept"


def _run(row: Row) -> Holder:
    plan = RunPlan.unpack(row["plan"])
    keys = [key for key in (plan.id, plan.parent) if key]
    return Holder(namespace=row["namespace"], id=row["id"], snapshots=[(plan.snapshotter, key) for key in keys])


def _container(row: Row) -> Holder:
    key = row["snapshot_key"]
    return Holder(
        namespace=row["namespace"], id=row["id"],
        snapshots=[(row["snapshotter"] or snapshot.DEFAULT, key)] if key else [],
        labels=of_collection(unpack(row["labels"])),
    )  # fmt: skip
