"""The life of snapshots: prepared or viewed, committed, looked at, removed. Everything the bus can ask but layers.

Each change is one transaction, with its event and its answer in it. Directories are made before it commits and taken
away after it has, so that a record always has its directory; a directory that a dead copy left without a record is
found at the next start (`reconcile`).

Where a snapshot begins with a copy of its parent, a first transaction writes down that it is being made, and the one
with its record comes when the copy is there. What a dead copy was making is dropped by the next one who has the lock of
its key: who repeats the request, or the sweep that finishes what nobody repeats.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import structlog
from shoal_bus.api import snapshot as api
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.filters import compile_filters
from shoal_bus.message import Empty
from shoal_bus.types import Labels

from shoal_snapshot.deleting import Deleting
from shoal_snapshot.leases import add_to_lease, mark_leased
from shoal_snapshot.records import Records, Snapshot
from shoal_snapshot.settling import Settling
from shoal_snapshot.snapshotter import Snapshotter
from shoal_snapshot.syscalls import syncfs

log = structlog.get_logger(__name__)

_PAGE = 200
_REMOVE_SECONDS, _BEHIND = 1.0, 64
"""How long a removal waits for the disk to be free again, where so many snapshots' files haven't been deleted yet: who
removes many gets no further ahead of the disk."""


class Snapshots:
    """The snapshots of one snapshotter, by namespace and key.

    Its events are told by the service whose database it is: a snapshotter in a process of its own has one of its own.
    """

    def __init__(self, database: Database, snapshotter: Snapshotter) -> None:
        self.db, self.snapshotter = database, snapshotter
        service = database.service or "snapshot"
        self._prepared = replace(api.SNAPSHOT_PREPARED, service=service)
        self._committed = replace(api.SNAPSHOT_COMMITTED, service=service)
        self._removed = replace(api.SNAPSHOT_REMOVED, service=service)
        self.records = Records(database, snapshotter.name)
        self.settling = Settling(database, snapshotter, self.records, self._lose)
        self._deleting = Deleting(snapshotter)
        self.on_uncovered: Callable[[], None] = lambda: None
        """Called when a removal may have left the snapshot below with nothing that holds it."""

    # -------------------------------------------------------------------------------------------------------- handlers

    async def prepare(self, ctx: Context, request: api.PrepareSnapshot) -> api.Mounts:
        """An active snapshot. NOT_FOUND or INVALID_ARGUMENT for its parent, ALREADY_EXISTS."""
        return await self._begin(ctx, request, "active")

    async def view(self, ctx: Context, request: api.PrepareSnapshot) -> api.Mounts:
        """A read-only snapshot. NOT_FOUND or INVALID_ARGUMENT for its parent, ALREADY_EXISTS."""
        return await self._begin(ctx, request, "view")

    async def _begin(self, ctx: Context, request: api.PrepareSnapshot, kind: api.Kind) -> api.Mounts:
        await add_to_lease(ctx, self.snapshotter.name, request.key)
        await self._have_settled(ctx.namespace, request.parent)
        return self.mounts_of(await self.add(ctx, request.key, kind, request.parent, request.labels, answer=True))

    async def _have_settled(self, namespace: str, parent: str) -> None:
        """Returns when what a client's snapshot is to lie on is on disk. NOT_FOUND where it couldn't be written."""
        below = self.records.find(namespace, parent) if parent else None
        if below is None or not below.unsettled:
            return
        await self.settling.settle()
        below = self.records.find(namespace, parent)
        if below is not None and below.unsettled:
            raise NotFound(f"parent snapshot {parent}: its files couldn't be written", hint="have it unpacked again")

    async def commit(self, ctx: Context, request: api.CommitSnapshot) -> api.SnapshotInfo:
        """The active snapshot becomes a committed one, once its files are on disk. Its labels are replaced."""
        snapshot = self.records.get(ctx.namespace, request.key)
        if request.name != request.key and self.records.find(ctx.namespace, request.name) is not None:
            raise AlreadyExists(f"snapshot {request.name}: already exists")
        if snapshot.kind != "active":
            raise FailedPrecondition(f"snapshot {request.key}: is {snapshot.kind}, only an active one can be committed")
        parent = None if snapshot.parent else request.parent or None
        if parent is not None and not self.snapshotter.parallel:
            raise FailedPrecondition(
                f"snapshot {request.key}: {self.snapshotter.name} can't lay another one under it now",
                hint="prepare it on its parent",
            )
        await add_to_lease(ctx, self.snapshotter.name, request.name)
        size, inodes = await asyncio.to_thread(self._settle, snapshot.id, self.records.parents(snapshot))
        with self.db.write(durable=True) as tx:
            self.records.require_whole_layers(snapshot)
            return self.commit_in(
                tx, ctx, snapshot, request.name, request.labels, api.Usage(size=size, inodes=inodes), parent
            ).info()

    def _settle(self, id: int, parents: Sequence[int]) -> tuple[int, int]:
        """Has an active snapshot's files on disk; what they take. Nothing is different when it is done twice."""
        self.snapshotter.seal(id)
        syncfs(str(self.snapshotter.layer(id)))
        return self.snapshotter.usage(id, parents)

    async def mounts(self, ctx: Context, request: api.SnapshotRequest) -> api.Mounts:
        """How an active snapshot or a view is mounted."""
        snapshot = self.records.get(ctx.namespace, request.key)
        if snapshot.kind == "committed":
            raise FailedPrecondition(f"snapshot {request.key}: is committed", hint="prepare or view one on top of it")
        self.records.touch(snapshot)
        return self.mounts_of(snapshot)

    async def stat(self, ctx: Context, request: api.SnapshotRequest) -> api.SnapshotInfo:
        """A snapshot's record."""
        snapshot = self.records.get(ctx.namespace, request.key)
        self.records.touch(snapshot)
        return snapshot.info()

    async def update(self, ctx: Context, request: api.UpdateSnapshot) -> api.SnapshotInfo:
        """Changes labels: all of them, or those that `fields` names; one without a value there is taken away."""
        with self.db.write() as tx:
            snapshot = self.records.get(ctx.namespace, request.key)
            updated = self.records.label(tx, snapshot, _updated(snapshot.labels, request.labels, request.fields))
            ctx.answer(tx, updated.info())
        return updated.info()

    async def each(self, ctx: Context, request: api.ListSnapshots) -> AsyncIterator[api.SnapshotInfo]:
        """The snapshots of the namespace that match, by key."""
        matches = compile_filters(request.filters)
        after = ""
        while page := self.records.of(ctx.namespace, after, _PAGE):
            for snapshot in page:
                if matches(snapshot.field):
                    yield snapshot.info()
            after = page[-1].key

    async def usage(self, ctx: Context, request: api.SnapshotRequest) -> api.Usage:
        """What a snapshot alone takes: of a committed one as it was recorded, of an active one as it is now."""
        snapshot = self.records.get(ctx.namespace, request.key)
        if snapshot.kind != "active" and not snapshot.unsettled:
            return snapshot.usage
        try:
            size, inodes = await asyncio.to_thread(self.snapshotter.usage, snapshot.id, self.records.parents(snapshot))
        except FileNotFoundError:
            return self.records.get(ctx.namespace, request.key).usage  # removed meanwhile, or a damaged one
        return api.Usage(size=size, inodes=inodes)

    async def remove(self, ctx: Context, request: api.SnapshotRequest) -> Empty:
        """Removes a snapshot. FAILED_PRECONDITION while others lie on it."""
        with self.db.write() as tx:
            snapshot = self.records.get(ctx.namespace, request.key)
            self._drop(tx, snapshot)
            ctx.answer(tx, Empty())
        self._deleting.discard(snapshot.id)
        if snapshot.parent_id is not None:
            self.on_uncovered()
        if self._deleting.behind > _BEHIND:
            await self.settled(_REMOVE_SECONDS)
        return Empty()

    async def cleanup(self, ctx: Context, request: api.SnapshotterRequest) -> api.CleanedUp:
        """Deletes directories without a record, and what was removed; returns when that is done."""
        with self.db.write() as tx:
            cleaned = api.CleanedUp(directories=self._discard_unrecorded())
            ctx.answer(tx, cleaned)
        self._deleting.soon()
        await self.settled()
        return cleaned

    async def info(self, ctx: Context, request: api.SnapshotterRequest) -> api.SnapshotterInfo:
        """What this snapshotter is."""
        return self.described()

    # ------------------------------------------------------------------------------------------------------ for layers

    def described(self) -> api.SnapshotterInfo:
        """What this snapshotter is."""
        maker = self.snapshotter
        return api.SnapshotterInfo(
            name=maker.name, root=str(maker.root), mount_type=maker.mount_type, capabilities=maker.capabilities()
        )

    def mounts_of(self, snapshot: Snapshot) -> api.Mounts:
        """A snapshot's mount list."""
        parents = self.records.parents(snapshot)
        return api.Mounts(mounts=self.snapshotter.mounts(snapshot.id, snapshot.kind, parents, snapshot.labels))

    def lowers_of(self, snapshot: Snapshot) -> list[str]:
        """The directories of the layers below a snapshot, the highest first; none where its own holds them."""
        if self.snapshotter.whole:
            return []
        return [str(self.snapshotter.layer(parent)) for parent in self.records.parents(snapshot)]

    async def add(
        self, ctx: Context, key: str, kind: api.Kind, parent: str, labels: Labels, *, answer: bool = False
    ) -> Snapshot:
        """A new snapshot with its directories and its event; with `answer`, its mounts are the request's answer."""
        if self.snapshotter.whole and kind == "active" and parent:
            return await self._add_filled(ctx, key, parent, labels, answer=answer)
        added: Snapshot | None = None
        try:
            with self.db.write() as tx:
                added = self.records.add(tx, ctx.namespace, key, kind, parent, labels, ctx.id)
                self.snapshotter.make(added.id, kind, self.records.parents(added), added.labels)
                self._added(tx, ctx, added, answer=answer)
        except BaseException:
            if added is not None:
                self._unmake(added.id)
            raise
        return added

    def commit_in(
        self,
        tx: Transaction,
        ctx: Context,
        snapshot: Snapshot,
        name: str,
        labels: Labels,
        usage: api.Usage | None,
        parent: str | None = None,
    ) -> Snapshot:
        """Commits a snapshot, with its event and the request's answer, inside a transaction.

        Its files are on disk, and its usage is known; or neither is so, and follows.
        """
        unsettled = "" if usage is not None else self.settling.boot
        committed = self.records.commit(tx, snapshot, name, labels, usage, parent, unsettled)
        if unsettled:
            tx.on_commit(self.settling.soon)
        told = api.SnapshotCommitted(key=snapshot.key, name=name, snapshotter=self.snapshotter.name)
        tx.emit(ctx.namespace, self._committed, told)
        ctx.answer(tx, committed.info())
        return committed

    def remove_if_there(self, namespace: str, key: str) -> bool:
        """Removes a snapshot that nothing lies on, or what a dead copy was making; says whether it was there."""
        if self.records.find(namespace, key) is None and not self.records.is_making(namespace, key):
            return False
        with self.db.write() as tx:
            self._end_making(tx, namespace, key)
            snapshot = self.records.find(namespace, key)
            if snapshot is not None:
                self._drop(tx, snapshot)
        if snapshot is not None:
            self._deleting.discard(snapshot.id)
        return snapshot is not None

    async def abandon(self, snapshot: Snapshot) -> None:
        """Removes what a failed attempt has made: its files before its record, or a full disk couldn't forget it."""
        self._deleting.discard(snapshot.id)
        await self.settled()
        self.remove_if_there(snapshot.namespace, snapshot.key)

    # ---------------------------------------------------------------------------------------------- for the collection

    def drop_childless(self, tx: Transaction, snapshot: Snapshot) -> bool:
        """Removes a snapshot's record, unless others lie on it, and says whether it did. `discard` does the rest."""
        try:
            self._drop(tx, snapshot)
        except FailedPrecondition:
            return False
        return True

    async def discard(self, removed: Sequence[Snapshot]) -> None:
        """Deletes what snapshots without a record have on disk, as `remove` does."""
        for snapshot in removed:
            self._deleting.discard(snapshot.id)
        await self.settled(_REMOVE_SECONDS)

    # ------------------------------------------------------------------------------------------------- start and stop

    def reconcile(self) -> None:
        """Mends what dead copies left: directories without a record, and records whose directory is gone.

        The transaction keeps living copies from making or removing anything meanwhile. A record that others lie on is
        left to be looked at: taking it away would take theirs.
        """
        with self.db.write() as tx:
            self._discard_unrecorded()
            there = self.snapshotter.ids()
            recorded = {snapshot.id: snapshot for snapshot in self.records.all()}
            missing = [recorded[id] for id in recorded.keys() - there]
            # Those that lie on others come first; ids don't tell.
            for snapshot in sorted(missing, key=lambda one: len(self.records.parents(one)), reverse=True):
                try:
                    self._drop(tx, snapshot)
                except FailedPrecondition as error:
                    log.error("reconcile.directory_missing", snapshot=snapshot.key, error=str(error))
                else:
                    log.warning("reconcile.record_without_directory", snapshot=snapshot.key, id=snapshot.id)
        self.settling.recover()
        self._deleting.soon()

    async def settled(self, seconds: float | None = None) -> None:
        """Returns when what was removed has been deleted, or after `seconds`."""
        await self._deleting.done(seconds)

    # ---------------------------------------------------------------------------------------------------------- within

    async def _add_filled(self, ctx: Context, key: str, parent: str, labels: Labels, *, answer: bool) -> Snapshot:
        """A new active snapshot that begins with its parent's files."""
        made, begun = 0, False
        try:
            with self.db.write() as tx:
                ctx.begin(tx)
                self._end_making(tx, ctx.namespace, key)
                made, parents = self.records.begin_making(tx, ctx.namespace, key, parent)
                self.snapshotter.make(made, "active", parents, labels)
            begun = True
            await self.snapshotter.fill(made, parents, labels)
            with self.db.write() as tx:
                self.records.end_making(tx, ctx.namespace, key)
                added = self.records.add(tx, ctx.namespace, key, "active", parent, labels, ctx.id, made)
                self._added(tx, ctx, added, answer=answer)
        except BaseException:
            if begun:  # its files go before its record, or a full disk couldn't forget it
                self.snapshotter.discard(made)
                self._deleting.soon()
                await self.settled()
                with self.db.write() as tx:
                    self.records.end_making(tx, ctx.namespace, key)
            elif made:
                self._unmake(made)
            raise
        return added

    def _added(self, tx: Transaction, ctx: Context, added: Snapshot, *, answer: bool) -> None:
        prepared = api.SnapshotPrepared(key=added.key, parent=added.parent, snapshotter=self.snapshotter.name)
        tx.emit(ctx.namespace, self._prepared, prepared)
        if answer:  # it is the client's: the layers' own are nobody's but their request's
            mark_leased(tx, ctx, added.id)
            ctx.answer(tx, self.mounts_of(added))

    def _end_making(self, tx: Transaction, namespace: str, key: str) -> None:
        """Drops what a dead copy was making."""
        dead = self.records.end_making(tx, namespace, key)
        if dead is not None:
            tx.on_commit(lambda: self._unmake(dead))

    def _unmake(self, id: int) -> None:
        """Takes away the directories of a snapshot that came to nothing.

        Its id may be free again, and another copy may have made a new one of it: the transaction tells.
        """
        with self.db.write():
            if not self.records.knows(id):
                self.snapshotter.discard(id)
        self._deleting.soon()

    def _discard_unrecorded(self) -> int:
        """Takes away what a dead copy left without a record, and says how much that was. Belongs in a transaction."""
        known = self.records.makings() | {snapshot.id for snapshot in self.records.all()}
        unrecorded = sorted(self.snapshotter.ids() - known)
        for id in unrecorded:
            self.snapshotter.discard(id)
            log.info("snapshots.directory_without_record", snapshotter=self.snapshotter.name, id=id)
        return len(unrecorded)

    def _drop(self, tx: Transaction, snapshot: Snapshot) -> None:
        self.records.drop(tx, snapshot)
        removed = api.SnapshotRemoved(key=snapshot.key, snapshotter=self.snapshotter.name)
        tx.emit(snapshot.namespace, self._removed, removed)

    def _lose(self, tx: Transaction, snapshot: Snapshot) -> None:
        """Removes a snapshot whose files aren't on disk."""
        self._drop(tx, snapshot)
        tx.on_commit(lambda: self._deleting.discard(snapshot.id))


def _updated(labels: Labels, given: Labels, fields: list[str]) -> Labels:
    if not fields:
        return dict(given)
    updated = dict(labels)
    for path in fields:
        if path == "labels":
            updated = dict(given)
            continue
        prefix, _, key = path.partition(".")
        if prefix != "labels" or not key:
            raise InvalidArgument(f"field {path!r}: of a snapshot only labels can be changed", hint="as labels.<key>")
        updated[key] = given.get(key, "")
    return updated
