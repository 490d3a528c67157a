"""Snapshots and garbage collection: what nothing lies on and nothing holds is offered, and swept if it still is so.

A snapshot stays while another lies on it, while it is labelled `containerd.io/gc.root` or `gc.expire`s later, and
within the epoch in which it was made, changed or looked at by someone who relies on it (`Records.touch`). An active
snapshot or a view that was made under no lease stays for a day, which is what a client's lease lasts unless it says
otherwise: whoever made it may be about to make a container of it. All else is decided by the content service, which
knows what refers to what; here it is only told what isn't referred to.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping

import structlog
from shoal_bus.api.content import NODE_GC, Collect
from shoal_bus.client import Client
from shoal_bus.collection import (
    PREFIX,
    Candidate,
    Epoch,
    LabelledSnapshot,
    Opened,
    Sweep,
    Swept,
    is_root,
    of_collection,
)
from shoal_bus.context import Context
from shoal_bus.database import Database, Row
from shoal_bus.errors import Aborted, ShoalError
from shoal_bus.message import Empty, unpack

from shoal_snapshot.records import Snapshot
from shoal_snapshot.snapshots import Snapshots

log = structlog.get_logger(__name__)

_NOTICE_SECONDS = 1.0
_LULL_SECONDS = 5.0
UNLEASED_SECONDS = 86_400.0
"""How long an active snapshot made under no lease stays with nothing that holds it."""


class Collection:
    """This service's part in garbage collection, for all of its snapshotters, by their names."""

    def __init__(self, database: Database, snapshotters: Mapping[str, Snapshots]) -> None:
        self._db, self._snapshotters = database, snapshotters

    async def open(self, ctx: Context, request: Epoch) -> Opened:
        """Opens an epoch; one that was left open ends with it."""
        opened = Opened(snapshotters=sorted(self._snapshotters))
        with self._db.write() as tx:
            tx.execute("UPDATE collection SET token = ?, epoch = epoch + 1, open = 1", (request.token,))
            ctx.answer(tx, opened)
        return opened

    async def close(self, ctx: Context, request: Epoch) -> Empty:
        """Closes an epoch, if it is still that one."""
        with self._db.write() as tx:
            tx.execute("UPDATE collection SET open = 0 WHERE token = ?", (request.token,))
            ctx.answer(tx, Empty())
        return Empty()

    async def labelled(self, ctx: Context, request: Epoch) -> AsyncIterator[LabelledSnapshot]:
        """The snapshots with labels that refer to something, or have something refer to them."""
        epoch, now = self._epoch(request.token), time.time()
        parents = {row["parent_id"] for row in self._db.read("SELECT DISTINCT parent_id FROM snapshots")}
        for row in self._db.read(f"{_ROWS} WHERE instr(labels, ?) > 0", (PREFIX.encode(),)):
            labels = of_collection(unpack(row["labels"]))
            if labels:
                held = row["id"] in parents or row["epoch"] >= epoch or _is_held(row, now)
                yield LabelledSnapshot(
                    namespace=row["namespace"], snapshotter=row["snapshotter"], key=row["key"], labels=labels, held=held
                )
        self._epoch(request.token)

    async def candidates(self, ctx: Context, request: Epoch) -> AsyncIterator[Candidate]:
        """What nothing lies on and nothing here holds, each with what is below it and would be next."""
        epoch, now = self._epoch(request.token), time.time()
        rows = {row["id"]: row for row in self._db.read(_ROWS) if row["snapshotter"] in self._snapshotters}
        children = Counter(row["parent_id"] for row in rows.values())
        for id, row in rows.items():
            keys: list[str] = []
            at: Row | None = row if not children[id] else None
            while at is not None and at["epoch"] < epoch and not _is_held(at, now):
                keys.append(at["key"])
                parent = rows.get(at["parent_id"])
                at = parent if parent is not None and children[parent["id"]] == 1 else None
            if keys:
                yield Candidate(namespace=row["namespace"], snapshotter=row["snapshotter"], keys=keys)

    async def sweep(self, ctx: Context, request: Sweep) -> Swept:
        """Removes those of the snapshots that may be removed, and says which. ABORTED when the epoch is over."""
        snapshots = self._snapshotters.get(request.snapshotter)
        if snapshots is None:
            return Swept()
        with self._db.write() as tx:
            epoch, now = self._epoch(request.token), time.time()
            removed = [
                snapshot
                for key in request.keys
                if (snapshot := snapshots.records.find(request.namespace, key)) is not None
                and self._may_go(snapshot, epoch, now)
                and snapshots.drop_childless(tx, snapshot)
            ]
            swept = Swept(keys=[snapshot.key for snapshot in removed])
            ctx.answer(tx, swept)
        await snapshots.discard(removed)
        return swept

    def _may_go(self, snapshot: Snapshot, epoch: int, now: float) -> bool:
        row = self._db.read_one(f"{_ROWS} WHERE id = ?", (snapshot.id,))
        return row is not None and row["epoch"] < epoch and not _is_held(row, now)

    def _epoch(self, token: str) -> int:
        row = self._db.read_one("SELECT token, epoch, open FROM collection")
        if row is None or row["token"] != token or not row["open"]:
            raise Aborted("this collection's epoch is no longer open")
        return int(row["epoch"])


_ROWS = (
    "SELECT id, namespace, snapshotter, key, parent_id, kind, labels, leased, epoch, created_at,"
    " EXISTS (SELECT 1 FROM applies WHERE snapshot_id = snapshots.id) AS busy FROM snapshots"
)


def _is_held(row: Row, now: float) -> bool:
    if row["busy"]:
        return True
    if row["kind"] != "committed" and not row["leased"] and row["created_at"] > now - UNLEASED_SECONDS:
        return True
    return PREFIX.encode() in row["labels"] and is_root(unpack(row["labels"]), now)


class Notice:
    """Has the content service collect soon when a removal may have made the snapshot below superfluous.

    It is no more than a notice: where it doesn't arrive, the next collection comes anyway.
    """

    def __init__(self, client: Client) -> None:
        self._client, self._wake = client, asyncio.Event()

    def give(self) -> None:
        """Gives notice in a while, once for however many removals."""
        self._wake.set()

    async def give_for_ever(self) -> None:
        """Passes on what has been noticed, now and then."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(_NOTICE_SECONDS)
            self._wake.clear()
            try:
                await self._client.call(NODE_GC, Collect(soon=True), patience=0.0)
            except ShoalError as error:
                log.debug("collection.notice_unheard", error=str(error))
            await asyncio.sleep(_LULL_SECONDS)
