"""What pulls under way need: nothing they hold is collected, and what they made goes with them if they fail."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from shoal_bus.database import Database, Transaction

from shoal_content.collect import Collector
from shoal_content.ingests import Ingests
from shoal_content.store import Store


class Holds:
    """The pulls of one node, as the database has them."""

    def __init__(self, database: Database, store: Store, ingests: Ingests, collector: Collector) -> None:
        self._db, self._store, self._ingests, self._collector = database, store, ingests, collector

    def begin(self, pull: str, namespace: str) -> str:
        """Begins a pull, or finds the one that a dead copy began; returns what makes its steps' ids unique."""
        with self._db.write() as tx:
            tx.execute("INSERT OR IGNORE INTO pulls VALUES (?, ?, ?)", (pull, namespace, secrets.token_hex(4)))
            return str(tx.execute("SELECT nonce FROM pulls WHERE id = ?", (pull,)).fetchone()["nonce"])

    def hold_blob(self, pull: str, namespace: str, digest: str) -> None:
        """Holds a blob that is there, or will be."""
        with self._db.write() as tx:
            made = not self._store.sees(namespace, digest)
            tx.execute("INSERT OR IGNORE INTO holds VALUES (?, ?, '', ?, 0, ?)", (pull, namespace, digest, made))

    def hold_snapshot(
        self, pull: str, namespace: str, snapshotter: str, chain_id: str, depth: int, *, made: bool
    ) -> None:
        """Holds a snapshot that is there, or (`made`) that this pull is about to make; the first word counts."""
        with self._db.write() as tx:
            tx.execute(
                "INSERT OR IGNORE INTO holds VALUES (?, ?, ?, ?, ?, ?)",
                (pull, namespace, snapshotter, chain_id, depth, made),
            )

    def succeed(self, tx: Transaction, pull: str, namespace: str, image: str) -> None:
        """Hands what a pull held over to the image that it has just made."""
        self.hand_over(tx, pull, namespace, image)
        self.end(tx, pull)

    def hand_over(
        self, tx: Transaction, pull: str, namespace: str, image: str, chain: Collection[str] | None = None
    ) -> None:
        """Gives an image the snapshots that a pull holds, or those of `chain` alone, instead of those it had."""
        self._collector.forget_unpacked(tx, namespace, image)  # this pull still holds its own
        self.add_unpacked(tx, pull, namespace, image, chain)

    def add_unpacked(
        self, tx: Transaction, pull: str, namespace: str, image: str, chain: Collection[str] | None = None
    ) -> None:
        """Gives an image the snapshots that a pull holds, or those of `chain` alone, besides those it has."""
        held = tx.execute("SELECT snapshotter, key, depth FROM holds WHERE pull = ? AND snapshotter != ''", (pull,))
        for row in held.fetchall():
            if chain is None or row["key"] in chain:
                tx.execute(
                    "INSERT OR IGNORE INTO unpacked VALUES (?, ?, ?, ?, ?)",
                    (namespace, image, row["snapshotter"], row["key"], row["depth"]),
                )

    def end(self, tx: Transaction, pull: str) -> None:
        """A pull that came to its good end holds nothing any more."""
        tx.execute("DELETE FROM holds WHERE pull = ?", (pull,))
        self._ingests.drop_of(tx, pull)
        tx.execute("DELETE FROM pulls WHERE id = ?", (pull,))

    def fail(self, pull: str) -> None:
        """Undoes a pull: its ingests' files first, since a full disk may be the reason."""
        self._ingests.remove_files_of(pull)
        with self._db.write() as tx:
            self._ingests.drop_of(tx, pull)
            made = tx.execute(
                "DELETE FROM holds WHERE pull = ? RETURNING namespace, snapshotter, key, depth, made", (pull,)
            ).fetchall()
            for row in made:
                if not row["made"]:
                    continue
                # Another pull that relies on it inherits it.
                heirs = tx.execute(
                    "UPDATE holds SET made = 1 WHERE namespace = ? AND snapshotter = ? AND key = ?",
                    (row["namespace"], row["snapshotter"], row["key"]),
                )
                if heirs.rowcount == 0 and row["snapshotter"]:
                    self._collector.doom(tx, row["namespace"], row["snapshotter"], row["key"], row["depth"], again=True)
            blobs = [row for row in made if row["made"] and not row["snapshotter"]]
            if blobs:
                self._collector.collect_blobs(tx, blobs[0]["namespace"], [row["key"] for row in blobs])
            tx.execute("DELETE FROM pulls WHERE id = ?", (pull,))

    def dead(self) -> list[str]:
        """Pulls whose request is no longer begun: nobody will finish or undo them."""
        rows = self._db.read("SELECT id FROM pulls WHERE id NOT IN (SELECT id FROM requests WHERE state = 'begun')")
        return [row["id"] for row in rows]

    def under_way(self) -> list[str]:
        """The pulls that have neither come to an end nor been undone."""
        return [row["id"] for row in self._db.read("SELECT id FROM pulls")]
