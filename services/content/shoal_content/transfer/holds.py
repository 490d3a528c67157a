"""What pulls under way need: leases of their own, which end with them.

A row comes before what it names: nothing a pull holds is collected. What it made goes when it fails, since nothing
holds it any longer; when it succeeds, an image leads there, by the labels that it is given in the same transaction.
"""

from __future__ import annotations

import secrets
from contextlib import suppress

from shoal_bus import image_reference as reference
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Descriptor

from shoal_content.blobs.ingests import Ingests
from shoal_content.blobs.store import Store
from shoal_content.collection.collect import want
from shoal_content.collection.referring import label_tree
from shoal_content.images.tree import Trees
from shoal_content.leasing import attach
from shoal_content.registry import sources


class Holds:
    """The pulls of one node, as the database has them."""

    def __init__(self, database: Database, store: Store, ingests: Ingests, trees: Trees) -> None:
        self._db, self._store, self._ingests, self._trees = database, store, ingests, trees

    def begin(self, pull: str, namespace: str, image: str = "", lease: str = "") -> str:
        """Begins a pull, or finds the one that a dead copy began; returns what makes its steps' ids unique.

        A lease that it is made under has the image from here on. NOT_FOUND for the lease.
        """
        with self._db.write() as tx:
            attach(tx, namespace, lease, "images", image)
            tx.execute("INSERT OR IGNORE INTO pulls VALUES (?, ?, ?)", (pull, namespace, secrets.token_hex(16)))
            return str(tx.execute("SELECT nonce FROM pulls WHERE id = ?", (pull,)).fetchone()["nonce"])

    def nonce(self, pull: str) -> str:
        """What makes the ids of a pull's steps unique; empty once it is over."""
        row = self._db.read_one("SELECT nonce FROM pulls WHERE id = ?", (pull,))
        return str(row["nonce"]) if row is not None else ""

    def hold_blob(self, pull: str, namespace: str, digest: str) -> None:
        """Holds a blob that is there, or will be."""
        self._hold(pull, namespace, "", digest)

    def hold_snapshots(self, pull: str, namespace: str, snapshotter: str, *chain_ids: str) -> None:
        """Holds snapshots. Whoever wants to know whether they are there asks afterwards: then they stay."""
        self._hold(pull, namespace, snapshotter, *chain_ids)

    def _hold(self, pull: str, namespace: str, snapshotter: str, *keys: str) -> None:
        with self._db.write() as tx:
            for key in keys:
                tx.execute("INSERT OR IGNORE INTO holds VALUES (?, ?, ?, ?)", (pull, namespace, snapshotter, key))

    def succeed(self, tx: Transaction, pull: str, namespace: str, image: str, lease: str = "") -> None:
        """Hands what a pull held over to the image that it has just made, and ends it. NOT_FOUND for the lease."""
        tree = self.hand_over(tx, pull, namespace, image, lease)
        held = tx.execute("SELECT key FROM holds WHERE pull = ? AND snapshotter = ''", (pull,)).fetchall()
        with suppress(InvalidArgument):  # a name that is no reference: it came from nowhere
            sources.remember(tx, namespace, tree.intersection(row["key"] for row in held), reference.parse(image))
        self.end(tx, pull)

    def hand_over(self, tx: Transaction, pull: str, namespace: str, image: str, lease: str = "") -> set[str]:
        """Has an image lead to what a pull holds, as far as it is the image's, in the transaction that makes it.

        A lease gets all that is held: it outlives the image. NOT_FOUND for the lease. Returns the image's blobs.
        """
        held = tx.execute("SELECT snapshotter, key FROM holds WHERE pull = ?", (pull,)).fetchall()
        row = tx.execute("SELECT target FROM images WHERE namespace = ? AND name = ?", (namespace, image)).fetchone()
        tree = set(self._trees.reachable(Descriptor.model_validate_json(row["target"])))
        for row in held if lease else ():
            type = f"snapshots/{row['snapshotter']}" if row["snapshotter"] else "content"
            attach(tx, namespace, lease, type, row["key"])
        unpacked = [(row["snapshotter"], row["key"]) for row in held if row["snapshotter"]]
        label_tree(tx, self._store, namespace, tree, unpacked)
        if any(not row["snapshotter"] and row["key"] not in tree for row in held):
            want(tx)  # the tag has moved meanwhile, say
        return tree

    def end(self, tx: Transaction, pull: str) -> None:
        """A pull that is over holds nothing any more."""
        tx.execute("DELETE FROM holds WHERE pull = ?", (pull,))
        self._ingests.drop_of(tx, pull)
        tx.execute("DELETE FROM pulls WHERE id = ?", (pull,))

    def under_way(self) -> list[str]:
        """The pulls that have neither come to an end nor been undone."""
        return [row["id"] for row in self._db.read("SELECT id FROM pulls")]

    def fail(self, pull: str) -> None:
        """Undoes a pull: its ingests' files first, since a full disk may be the reason. The rest is collected."""
        self._ingests.remove_files_of(pull)
        with self._db.write() as tx:
            self._fail(tx, pull)

    def fail_dead(self) -> list[str]:
        """Undoes pulls whose request is over, and whose own undoing failed; says which."""
        dead = [row["id"] for row in self._db.read(_DEAD)]
        for pull in dead:
            self._ingests.remove_files_of(pull, lambda tx, pull=pull: _is_dead(tx, pull))  # type: ignore[misc]
            with self._db.write() as tx:
                if _is_dead(tx, pull):
                    self._fail(tx, pull)
        return dead

    def _fail(self, tx: Transaction, pull: str) -> None:
        want(tx)
        self.end(tx, pull)


def _is_dead(tx: Transaction, pull: str) -> bool:
    """Whether still nobody has taken a pull up again."""
    return tx.execute(f"{_DEAD} AND id = ?", (pull,)).fetchone() is not None


_DEAD = "SELECT id FROM pulls WHERE id NOT IN (SELECT id FROM requests WHERE state = 'begun')"
