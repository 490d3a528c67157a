"""Removal of what nobody needs any more: the blobs and snapshots of a deleted image, or of a pull that failed.

Only what such an image or pull led to is looked at: a blob that a client wrote for an image that it has yet to make is
never touched. A blob stays in its namespace while another image of it leads there, a pull under way holds it, or it is
labelled `containerd.io/gc.root`. Snapshots are another service's: they are put on a list (`doomed`) in the transaction
that makes them superfluous, and removed afterwards, top first, as often as it takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import structlog
from shoal_bus.api import snapshot as snapshots
from shoal_bus.client import Client
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import Code, FailedPrecondition, NotFound, ShoalError
from shoal_bus.locks import Locks
from shoal_bus.types import Descriptor

from shoal_content.labels import load
from shoal_content.store import Store
from shoal_content.tree import Trees

log = structlog.get_logger(__name__)

GC_ROOT = "containerd.io/gc.root"
_PATIENCE_SECONDS = 2.0
_STRAGGLER_SECONDS = 120.0
"""How long after a failed pull an unpacking that nobody wants any more may still come to its end."""


class Collector:
    """Takes away what is superfluous, in two steps: inside a transaction, and after it (`finish`)."""

    def __init__(self, database: Database, store: Store, trees: Trees, locks: Locks) -> None:
        self._db, self._store, self._trees, self._locks = database, store, trees, locks

    # ------------------------------------------------------------------------------------------------ in a transaction

    def collect_tree(self, tx: Transaction, namespace: str, target: Descriptor) -> None:
        """Hides from a namespace what only an image that it no longer has led to."""
        self.collect_blobs(tx, namespace, self._trees.reachable(target))

    def collect_blobs(self, tx: Transaction, namespace: str, digests: Iterable[str]) -> None:
        """Hides those blobs that nothing of the namespace needs."""
        needed = self._needed(tx, namespace)
        for digest in digests:
            if digest not in needed and not self._is_root(tx, namespace, digest):
                self._store.hide(tx, namespace, digest)

    def forget_unpacked(self, tx: Transaction, namespace: str, image: str) -> None:
        """An image's layers are needed by it no longer: dooms the snapshots that no other image or pull needs."""
        rows = tx.execute(
            "DELETE FROM unpacked WHERE namespace = ? AND image = ? RETURNING snapshotter, chain_id, depth",
            (namespace, image),
        ).fetchall()
        for row in rows:
            self.doom(tx, namespace, row["snapshotter"], row["chain_id"], row["depth"])

    @staticmethod
    def share_unpacked(tx: Transaction, namespace: str, image: str, other: str) -> None:
        """What an image's layers are unpacked to is another name's, too."""
        tx.execute(
            "INSERT OR IGNORE INTO unpacked SELECT namespace, ?, snapshotter, chain_id, depth FROM unpacked"
            " WHERE namespace = ? AND image = ?",
            (other, namespace, image),
        )

    def doom(
        self, tx: Transaction, namespace: str, snapshotter: str, chain_id: str, depth: int, *, again: bool = False
    ) -> None:
        """Puts a snapshot on the list, unless an image or a pull needs it.

        `again`: it may be in the making still, and come to be after it was looked for.
        """
        if not self._snapshot_needed(tx, namespace, snapshotter, chain_id):
            until = time.time() + _STRAGGLER_SECONDS if again else 0.0
            tx.execute(
                "INSERT OR IGNORE INTO doomed VALUES (?, ?, ?, ?, ?)", (namespace, snapshotter, chain_id, depth, until)
            )

    # ------------------------------------------------------------------------------------------------------ afterwards

    async def finish(self, client: Client) -> None:
        """Removes bytes nobody sees, and the snapshots on the list. What can't be removed now stays on it."""
        self._store.purge()
        away: set[str] = set()
        rows = self._db.read("SELECT * FROM doomed ORDER BY depth DESC")
        for row in rows:
            namespace, snapshotter, chain_id = row["namespace"], row["snapshotter"], row["chain_id"]
            if snapshotter in away:
                continue
            # A pull that wants this snapshot decides under the same lock whether it is there.
            async with self._locks.hold(snapshot_lock(namespace, snapshotter, chain_id)):
                try:
                    await self._remove(client.with_namespace(namespace), namespace, snapshotter, chain_id, row["until"])
                except FailedPrecondition:
                    log.debug("collect.snapshot_in_use", snapshot=chain_id, namespace=namespace)
                except ShoalError as error:
                    if error.code is Code.UNAVAILABLE:
                        away.add(snapshotter)
                    log.warning("collect.snapshot_kept", snapshot=chain_id, namespace=namespace, error=str(error))

    async def _remove(self, client: Client, namespace: str, snapshotter: str, chain_id: str, until: float) -> None:
        with self._db.write() as tx:
            needed = self._snapshot_needed(tx, namespace, snapshotter, chain_id)
            if needed:
                self._strike(tx, namespace, snapshotter, chain_id)
        if needed:
            return
        try:
            await client.call(
                snapshots.SNAPSHOT_REMOVE.on(snapshotter),
                snapshots.SnapshotRequest(key=chain_id),
                patience=_PATIENCE_SECONDS,
            )
        except NotFound:
            if time.time() < until:
                return
        with self._db.write() as tx:
            self._strike(tx, namespace, snapshotter, chain_id)

    # ---------------------------------------------------------------------------------------------------------- within

    def _needed(self, tx: Transaction, namespace: str) -> set[str]:
        needed: set[str] = set()
        for row in tx.execute("SELECT target FROM images WHERE namespace = ?", (namespace,)).fetchall():
            needed.update(self._trees.reachable(Descriptor.model_validate_json(row["target"])))
        held = tx.execute("SELECT key FROM holds WHERE namespace = ? AND snapshotter = ''", (namespace,))
        needed.update(row["key"] for row in held)
        return needed

    @staticmethod
    def _is_root(tx: Transaction, namespace: str, digest: str) -> bool:
        row = tx.execute(
            "SELECT labels FROM visible WHERE namespace = ? AND digest = ?", (namespace, digest)
        ).fetchone()
        return row is not None and GC_ROOT in load(row["labels"])

    @staticmethod
    def _snapshot_needed(tx: Transaction, namespace: str, snapshotter: str, chain_id: str) -> bool:
        where = (namespace, snapshotter, chain_id)
        return (
            tx.execute(
                "SELECT 1 FROM unpacked WHERE namespace = ? AND snapshotter = ? AND chain_id = ?"
                " UNION ALL SELECT 1 FROM holds WHERE namespace = ? AND snapshotter = ? AND key = ? LIMIT 1",
                where + where,
            ).fetchone()
            is not None
        )

    @staticmethod
    def _strike(tx: Transaction, namespace: str, snapshotter: str, chain_id: str) -> None:
        tx.execute(
            "DELETE FROM doomed WHERE namespace = ? AND snapshotter = ? AND chain_id = ?",
            (namespace, snapshotter, chain_id),
        )


def snapshot_lock(namespace: str, snapshotter: str, chain_id: str) -> str:
    """The lock under which it is decided whether a snapshot stays."""
    return f"{namespace} chain/{snapshotter}/{chain_id}"
