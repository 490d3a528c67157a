"""What the service remembers: snapshots, and which one lies on which.

A snapshot's `id` names its directory and never changes; its key does, when it is committed under another name.
"""

from __future__ import annotations

import sqlite3
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from shoal_bus.api.snapshot import Kind, SnapshotInfo, Usage
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.filters import label_field
from shoal_bus.message import pack, unpack

COLLECTION = """
ALTER TABLE snapshots ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;   -- of garbage collection, when it last mattered
ALTER TABLE snapshots ADD COLUMN leased INTEGER NOT NULL DEFAULT 0;  -- made under a lease
CREATE TABLE collection (                                            -- one row: the newest epoch
    token TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    open  INTEGER NOT NULL
);
INSERT INTO collection VALUES ('', 0, 0);
CREATE TRIGGER snapshot_made AFTER INSERT ON snapshots WHEN (SELECT open FROM collection)
BEGIN
    UPDATE snapshots SET epoch = (SELECT epoch FROM collection) WHERE id = NEW.id;
END;
CREATE TRIGGER snapshot_changed AFTER UPDATE OF key, kind, labels ON snapshots WHEN (SELECT open FROM collection)
BEGIN
    UPDATE snapshots SET epoch = (SELECT epoch FROM collection) WHERE id = NEW.id;
END;
"""

_SNAPSHOTS = """
CREATE TABLE snapshots (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used twice: it names a directory
    snapshotter TEXT NOT NULL,
    namespace   TEXT NOT NULL,
    key         TEXT NOT NULL,
    parent_id   INTEGER REFERENCES snapshots (id),
    kind        TEXT NOT NULL,                       -- active, view, committed
    labels      BLOB NOT NULL,
    size        INTEGER NOT NULL DEFAULT 0,          -- bytes and inodes of a committed one
    inodes      INTEGER NOT NULL DEFAULT 0,
    request_id  TEXT NOT NULL,
    created_at  REAL NOT NULL,
    updated_at  REAL NOT NULL,
    UNIQUE (snapshotter, namespace, key)
);
CREATE INDEX snapshots_parent ON snapshots (parent_id);
CREATE TABLE applies (                               -- layers being applied to active snapshots
    request_id  TEXT PRIMARY KEY,
    snapshot_id INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    was_empty   INTEGER NOT NULL
) WITHOUT ROWID;
"""
_MAKINGS = """
CREATE TABLE makings (                               -- snapshots that their parent is being copied into
    id          INTEGER PRIMARY KEY,                 -- theirs, once they are there
    snapshotter TEXT NOT NULL,
    namespace   TEXT NOT NULL,
    key         TEXT NOT NULL,
    parent_id   INTEGER NOT NULL REFERENCES snapshots (id),
    UNIQUE (snapshotter, namespace, key)
);
CREATE INDEX makings_parent ON makings (parent_id);
"""
_SETTLING = """
ALTER TABLE snapshots ADD COLUMN unsettled TEXT NOT NULL DEFAULT '';  -- the boot that unpacked it; empty: it is on disk
CREATE INDEX snapshots_unsettled ON snapshots (snapshotter, unsettled) WHERE unsettled != '';
"""
_UNFINISHED = """
CREATE TABLE unfinished (                            -- active snapshots that hold a part of a layer
    snapshot_id INTEGER PRIMARY KEY REFERENCES snapshots (id) ON DELETE CASCADE,
    request_id  TEXT NOT NULL                        -- who applies it, or did
);
"""
MIGRATIONS = [_SNAPSHOTS, _MAKINGS, COLLECTION, _SETTLING, _UNFINISHED]

LOST = "lost"
"""What a committed snapshot is unsettled by whose files couldn't be written: no boot's id."""

MAX_DEPTH = 500
"""Layers in a chain: as many as the kernel's overlayfs merges (OVL_MAX_STACK)."""

_CHAINS_KEPT = 1024
_SELECT = "SELECT s.*, p.key AS parent FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent_id"


@dataclass(frozen=True)
class Snapshot:
    """One row, with its parent's key."""

    id: int
    namespace: str
    key: str
    parent_id: int | None
    parent: str
    kind: Kind
    labels: dict[str, str]
    usage: Usage
    request_id: str
    created_at: datetime
    updated_at: datetime
    unsettled: str
    """Of a committed one that may not be on disk: which boot committed it."""

    def info(self) -> SnapshotInfo:
        """The record as the bus has it."""
        return SnapshotInfo(
            key=self.key, parent=self.parent, kind=self.kind, labels=self.labels,
            created_at=self.created_at, updated_at=self.updated_at,
        )  # fmt: skip

    def field(self, path: Sequence[str]) -> str | None:
        """What containerd's filters find at a field path: `kind`, `name`, `parent`, `labels.<key>`."""
        if len(path) == 1 and path[0] in ("kind", "name", "parent"):
            return {"kind": self.kind, "name": self.key, "parent": self.parent}[path[0]]
        return label_field(self.labels, path)


class Records:
    """The snapshots of one snapshotter. Whatever changes them is given a transaction, and raises before it changes."""

    def __init__(self, database: Database, snapshotter: str) -> None:
        self.db, self.snapshotter = database, snapshotter
        self._chains: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    # --------------------------------------------------------------------------------------------------------- reading

    def find(self, namespace: str, key: str) -> Snapshot | None:
        """The snapshot of that key, or None."""
        row = self.db.read_one(
            f"{_SELECT} WHERE s.snapshotter = ? AND s.namespace = ? AND s.key = ?", (self.snapshotter, namespace, key)
        )
        return _snapshot(row) if row is not None else None

    def get(self, namespace: str, key: str) -> Snapshot:
        """The snapshot of that key, or NOT_FOUND."""
        found = self.find(namespace, key)
        if found is None:
            raise NotFound(f"snapshot {key}: not found")
        return found

    def by_id(self, namespace: str, id: int) -> Snapshot | None:
        """The snapshot whose directory is `id`, if it is that namespace's."""
        row = self.db.read_one(
            f"{_SELECT} WHERE s.snapshotter = ? AND s.namespace = ? AND s.id = ?", (self.snapshotter, namespace, id)
        )
        return _snapshot(row) if row is not None else None

    def of(self, namespace: str, after: str, limit: int) -> list[Snapshot]:
        """The next snapshots of a namespace in the order of their keys: a long list is read page by page."""
        rows = self.db.read(
            f"{_SELECT} WHERE s.snapshotter = ? AND s.namespace = ? AND s.key > ? ORDER BY s.key LIMIT ?",
            (self.snapshotter, namespace, after, limit),
        )
        return [_snapshot(row) for row in rows]

    def all(self) -> list[Snapshot]:
        """Every snapshot of every namespace."""
        rows = self.db.read(f"{_SELECT} WHERE s.snapshotter = ? ORDER BY s.id", (self.snapshotter,))
        return [_snapshot(row) for row in rows]

    def parents(self, snapshot: Snapshot) -> list[int]:
        """The ids of what a snapshot lies on, the nearest first."""
        return list(self._chain(snapshot.parent_id)) if snapshot.parent_id is not None else []

    def _chain(self, id: int) -> tuple[int, ...]:
        """The ids of a committed snapshot and of what it lies on: as long as it is there, those never change."""
        known = self._chains.get(id)
        if known is not None:
            self._chains.move_to_end(id)
            return known
        row = self.db.read_one("SELECT parent_id FROM snapshots WHERE id = ?", (id,))
        below: int | None = row["parent_id"] if row is not None else None
        rest = (self._chains.get(below) or self._read_chain(below)) if below is not None else ()
        chain = self._chains[id] = (id, *rest)
        while len(self._chains) > _CHAINS_KEPT:
            self._chains.popitem(last=False)
        return chain

    def _read_chain(self, id: int) -> tuple[int, ...]:
        rows = self.db.read(
            "WITH RECURSIVE chain (id, depth) AS ("
            " SELECT ?1, 0"
            " UNION ALL SELECT s.parent_id, c.depth + 1 FROM snapshots s JOIN chain c ON s.id = c.id"
            "  WHERE s.parent_id IS NOT NULL)"
            " SELECT id FROM chain ORDER BY depth",
            (id,),
        )
        return tuple(row["id"] for row in rows)

    def makings(self) -> set[int]:
        """The ids of snapshots that are being made."""
        rows = self.db.read("SELECT id FROM makings WHERE snapshotter = ?", (self.snapshotter,))
        return {row["id"] for row in rows}

    def is_making(self, namespace: str, key: str) -> bool:
        """Whether a snapshot of that key is being made, or was by a dead copy."""
        where = (self.snapshotter, namespace, key)
        found = self.db.read_one("SELECT 1 FROM makings WHERE snapshotter = ? AND namespace = ? AND key = ?", where)
        return found is not None

    def unsettled(self, boot: str) -> list[Snapshot]:
        """What was committed in this boot, and may not be on disk."""
        rows = self.db.read(
            f"{_SELECT} WHERE s.snapshotter = ? AND s.unsettled != '' AND s.unsettled = ?", (self.snapshotter, boot)
        )
        return [_snapshot(row) for row in rows]

    def lost(self, boot: str) -> list[Snapshot]:
        """What isn't on disk, and never will be: what lies on others comes first."""
        rows = self.db.read(
            f"{_SELECT} WHERE s.snapshotter = ? AND s.unsettled != '' AND s.unsettled != ?", (self.snapshotter, boot)
        )
        return sorted((_snapshot(row) for row in rows), key=lambda one: len(self.parents(one)), reverse=True)

    def knows(self, id: int) -> bool:
        """Whether there is a snapshot `id`, in any namespace, or one that is being made."""
        found = self.db.read_one(
            "SELECT id FROM snapshots WHERE id = ?1 UNION SELECT id FROM makings WHERE id = ?1", (id,)
        )
        return found is not None

    # -------------------------------------------------------------------------------------------------------- changing

    def begin_making(self, tx: Transaction, namespace: str, key: str, parent: str) -> tuple[int, list[int]]:
        """The id of a snapshot that is to be there later, and of those below it. Errors are those of `add`.

        Its parent can't be dropped meanwhile. Whoever begins one has that key's lock, and has ended a dead one's.
        """
        if self.find(namespace, key) is not None:
            raise AlreadyExists(f"snapshot {key}: already exists")
        below = self._committed_parent(namespace, parent)
        parents = [below.id, *self.parents(below)]
        _check_depth(key, parents)
        tx.execute("INSERT INTO sqlite_sequence SELECT 'snapshots', 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence"
                   " WHERE name = 'snapshots')")  # fmt: skip
        row = tx.execute("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'snapshots' RETURNING seq").fetchone()
        tx.execute(
            "INSERT INTO makings (id, snapshotter, namespace, key, parent_id) VALUES (?, ?, ?, ?, ?)",
            (row["seq"], self.snapshotter, namespace, key, below.id),
        )
        return row["seq"], parents

    def end_making(self, tx: Transaction, namespace: str, key: str) -> int | None:
        """Forgets that a snapshot was being made; its id, if it was."""
        row = tx.execute(
            "DELETE FROM makings WHERE snapshotter = ? AND namespace = ? AND key = ? RETURNING id",
            (self.snapshotter, namespace, key),
        ).fetchone()
        return row["id"] if row is not None else None

    def add(
        self, tx: Transaction, namespace: str, key: str, kind: Kind, parent: str, labels: Mapping[str, str],
        request_id: str, id: int | None = None,
    ) -> Snapshot:  # fmt: skip
        """A new snapshot on top of a committed one. ALREADY_EXISTS, NOT_FOUND for the parent, INVALID_ARGUMENT.

        `id` is that of one that was being made.
        """
        if self.find(namespace, key) is not None:
            raise AlreadyExists(f"snapshot {key}: already exists")
        below = self._committed_parent(namespace, parent) if parent else None
        now = time.time()
        tx.execute(
            "INSERT INTO snapshots"
            " (id, snapshotter, namespace, key, parent_id, kind, labels, request_id, created_at, updated_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (id, self.snapshotter, namespace, key, below.id if below else None, kind, _packed(labels), request_id,
             now, now),
        )  # fmt: skip
        added = self.get(namespace, key)
        _check_depth(key, self.parents(added))
        return added

    def commit(
        self, tx: Transaction, snapshot: Snapshot, name: str, labels: Mapping[str, str], usage: Usage | None,
        parent: str | None = None, unsettled: str = "",
    ) -> Snapshot:  # fmt: skip
        """The active `snapshot` becomes the committed `name`; its labels are replaced. ALREADY_EXISTS for the name.

        `parent` is what it lies on from now on, where that isn't what it was made with. Of an `unsettled` one it isn't
        known yet what it takes.
        """
        now = time.time()
        current = self.get(snapshot.namespace, snapshot.key)
        if current.id != snapshot.id or current.kind != "active":
            raise FailedPrecondition(f"snapshot {snapshot.key}: is {current.kind}, only an active one can be committed")
        if self.find(snapshot.namespace, name) is not None:
            raise AlreadyExists(f"snapshot {name}: already exists")
        parent_id = snapshot.parent_id
        if parent is not None:
            parent_id = self._committed_parent(snapshot.namespace, parent).id if parent else None
        tx.execute(
            "UPDATE snapshots SET key = ?, kind = 'committed', labels = ?, size = ?, inodes = ?, created_at = ?,"
            " updated_at = ?, parent_id = ?, unsettled = ? WHERE id = ?",
            (name, _packed(labels), usage.size if usage else 0, usage.inodes if usage else 0, now, now, parent_id,
             unsettled, snapshot.id),
        )  # fmt: skip
        committed = self.get(snapshot.namespace, name)
        _check_depth(name, self.parents(committed))
        return committed

    def settle(self, tx: Transaction, snapshot: Snapshot, unsettled: str, usage: Usage | None = None) -> None:
        """Notes whether a committed snapshot is on disk, and what it takes."""
        if usage is not None:
            tx.execute(
                "UPDATE snapshots SET size = ?, inodes = ? WHERE id = ?", (usage.size, usage.inodes, snapshot.id)
            )
        tx.execute("UPDATE snapshots SET unsettled = ? WHERE id = ?", (unsettled, snapshot.id))

    def label(self, tx: Transaction, snapshot: Snapshot, labels: Mapping[str, str]) -> Snapshot:
        """Replaces the labels."""
        tx.execute(
            "UPDATE snapshots SET labels = ?, updated_at = ? WHERE id = ?",
            (_packed(labels), time.time(), snapshot.id),
        )
        return self.get(snapshot.namespace, snapshot.key)

    def require_whole_layers(self, snapshot: Snapshot, request_id: str = "") -> None:
        """FAILED_PRECONDITION for a snapshot that holds a part of a layer, unless `request_id` is who applies that."""
        found = "SELECT 1 FROM unfinished WHERE snapshot_id = ? AND request_id != ?"
        if self.db.read_one(found, (snapshot.id, request_id)) is not None:
            raise FailedPrecondition(
                f"snapshot {snapshot.key}: holds only a part of a layer that was applied to it",
                hint="remove it, and prepare another one",
            )

    def touch(self, snapshot: Snapshot) -> None:
        """Has a collection under way leave a snapshot that somebody relies on from here on. NOT_FOUND if it has it.

        Whoever relies on it has written his reference before: a collection that begins later sees that.
        """
        if self.db.read_one("SELECT 1 FROM collection WHERE open") is None:
            return
        with self.db.write() as tx:
            stamped = tx.execute(
                "UPDATE snapshots SET epoch = (SELECT epoch FROM collection) WHERE id = ?", (snapshot.id,)
            )
            if stamped.rowcount == 0:
                raise NotFound(f"snapshot {snapshot.key}: not found")

    def drop(self, tx: Transaction, snapshot: Snapshot) -> None:
        """Removes the record. FAILED_PRECONDITION while others lie on it."""
        child = self.db.read_one(
            "SELECT key FROM snapshots WHERE parent_id = ?1 UNION SELECT key FROM makings WHERE parent_id = ?1 LIMIT 1",
            (snapshot.id,),
        )
        if child is not None:
            raise FailedPrecondition(
                f"snapshot {snapshot.key}: snapshot {child['key']} lies on it", hint="remove that one first"
            )
        tx.execute("DELETE FROM snapshots WHERE id = ?", (snapshot.id,))

    def _committed_parent(self, namespace: str, parent: str) -> Snapshot:
        below = self.find(namespace, parent)
        if below is None:
            raise NotFound(f"parent snapshot {parent}: not found")
        if below.kind != "committed":
            raise InvalidArgument(f"parent snapshot {parent}: is {below.kind}", hint="commit it first")
        return below


def _check_depth(key: str, parents: Sequence[int]) -> None:
    if len(parents) > MAX_DEPTH:
        raise FailedPrecondition(f"snapshot {key}: more than {MAX_DEPTH} layers below it")


def _packed(labels: Mapping[str, str]) -> bytes:
    """Labels as a row holds them; one with an empty value is none, as in containerd."""
    return pack({key: value for key, value in labels.items() if value})


def _snapshot(row: sqlite3.Row) -> Snapshot:
    return Snapshot(
        id=row["id"],
        namespace=row["namespace"],
        key=row["key"],
        parent_id=row["parent_id"],
        parent=row["parent"] or "",
        kind=row["kind"],
        labels=unpack(row["labels"]),
        usage=Usage(size=row["size"], inodes=row["inodes"]),
        request_id=row["request_id"],
        created_at=datetime.fromtimestamp(row["created_at"], UTC),
        updated_at=datetime.fromtimestamp(row["updated_at"], UTC),
        unsettled=row["unsettled"],
    )
