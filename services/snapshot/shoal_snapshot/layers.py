"""Layers into snapshots: unpacked into one of their own, or applied to one that a client prepared."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from shoal_bus.api.snapshot import AppliedLayer, ApplyLayer, ApplyProgress, SnapshotInfo, UnpackLayer, Usage
from shoal_bus.context import Context
from shoal_bus.errors import FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.types import Descriptor, Mount

from shoal_snapshot import disk
from shoal_snapshot.apply.pool import Pool
from shoal_snapshot.apply.worker import Done, Job
from shoal_snapshot.leases import add_to_lease
from shoal_snapshot.records import Snapshot
from shoal_snapshot.snapshots import Snapshots

PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"


class Layers:
    """What is done with layers in one snapshotter."""

    def __init__(self, snapshots: Snapshots, pool: Pool) -> None:
        self._snapshots, self._records, self._db = snapshots, snapshots.records, snapshots.db
        self._pool = pool

    # ---------------------------------------------------------------------------------------------------------- unpack

    async def unpack(self, ctx: Context, request: UnpackLayer) -> SnapshotInfo:
        """The layer becomes the committed snapshot `name`; one that is there is the answer.

        It is extracted into an active snapshot of the request's own, so that nobody sees it before it is whole. What a
        dead copy began is dropped and begun anew: it can't be told how much of it was written.
        """
        key = _extract_key(ctx, request)
        await add_to_lease(ctx, self._snapshots.snapshotter.name, request.name)
        self._snapshots.remove_if_there(ctx.namespace, key)
        if ctx.resumed:
            await self._snapshots.settled()  # its room is needed again
        there = self._committed(ctx, request.name)
        if there is not None:
            return there
        snapshot = self._snapshots.add(ctx, key, "active", request.parent, {})
        try:
            done = await self._apply(ctx, request, snapshot, request.diff_id, sync=True)
            with self._db.write(durable=True) as tx:
                usage = Usage(size=done.usage_size, inodes=done.usage_inodes)
                if self._records.find(ctx.namespace, request.name) is None:
                    return self._snapshots.commit_in(tx, ctx, snapshot, request.name, request.labels, usage).info()
        except BaseException:
            await self._snapshots.abandon(snapshot)
            raise
        # Somebody committed another snapshot under that name meanwhile.
        self._snapshots.remove_if_there(ctx.namespace, key)
        there = self._committed(ctx, request.name)
        if there is None:
            raise FailedPrecondition(f"snapshot {request.name}: came and went while it was unpacked", hint="try again")
        return there

    async def undo_unpack(self, ctx: Context, request: UnpackLayer) -> None:
        """Drops what a dead copy began and nobody wants any more."""
        self._snapshots.remove_if_there(ctx.namespace, _extract_key(ctx, request))

    def _committed(self, ctx: Context, name: str) -> SnapshotInfo | None:
        there = self._records.find(ctx.namespace, name)
        if there is not None and there.kind != "committed":
            raise FailedPrecondition(f"snapshot {name}: is there, but {there.kind}", hint="remove it, or commit it")
        if there is not None:
            self._records.touch(there)
        return there.info() if there is not None else None

    # ----------------------------------------------------------------------------------------------------------- apply

    async def apply(self, ctx: Context, request: ApplyLayer) -> AppliedLayer:
        """Applies a layer to what `mounts` describe: an active snapshot of this snapshotter and this namespace.

        It is written to the snapshot's own directory. One that was empty is empty again if this fails.
        """
        if ctx.resumed:
            await self.undo_apply(ctx, request)
        snapshot = self._target(ctx, request.mounts)
        root = self._snapshots.snapshotter.layer(snapshot.id)
        with self._db.write() as tx:
            tx.execute(
                "INSERT INTO applies (request_id, snapshot_id, was_empty) VALUES (?, ?, ?)",
                (ctx.id, snapshot.id, not any(root.iterdir())),
            )
        try:
            done = await self._apply(ctx, request, snapshot, request.diff_id or "")
            with self._db.write() as tx:
                if self._records.by_id(ctx.namespace, snapshot.id) is None:
                    raise NotFound(f"snapshot {snapshot.key}: was removed while a layer was applied to it")
                uncompressed = Descriptor(media_type=PLAIN_LAYER, digest=done.diff_id, size=done.uncompressed)
                applied = AppliedLayer(descriptor=uncompressed, entries=done.entries)
                tx.execute("DELETE FROM applies WHERE request_id = ?", (ctx.id,))
                ctx.answer(tx, applied)
        except BaseException:
            await self.undo_apply(ctx, request)
            raise
        return applied

    async def undo_apply(self, ctx: Context, request: ApplyLayer) -> None:
        """Empties the directory that a layer was being applied to, where it was empty before."""
        row = self._db.read_one("SELECT * FROM applies WHERE request_id = ?", (ctx.id,))
        if row is None:
            return
        if row["was_empty"]:
            with suppress(FileNotFoundError):  # it was removed meanwhile
                await asyncio.to_thread(disk.empty, str(self._snapshots.snapshotter.layer(row["snapshot_id"])))
        with self._db.write() as tx:
            tx.execute("DELETE FROM applies WHERE request_id = ?", (ctx.id,))

    def _target(self, ctx: Context, mounts: list[Mount]) -> Snapshot:
        layer = Path(target_of(mounts))
        snapshotter = self._snapshots.snapshotter
        id = layer.parent.name
        snapshot = self._records.by_id(ctx.namespace, int(id)) if id.isdecimal() and len(id) < 19 else None
        if snapshot is None or snapshotter.layer(snapshot.id) != layer:
            raise NotFound(f"{layer}: is no {snapshotter.name} snapshot of this namespace")
        if snapshot.kind != "active":
            raise FailedPrecondition(f"snapshot {snapshot.key}: is {snapshot.kind}, layers go into active ones")
        return snapshot

    # ---------------------------------------------------------------------------------------------------------- within

    async def _apply(
        self, ctx: Context, request: UnpackLayer | ApplyLayer, snapshot: Snapshot, diff_id: str, *, sync: bool = False
    ) -> Done:
        descriptor = request.descriptor
        job = Job(
            path=request.path, media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size,
            root=str(self._snapshots.snapshotter.layer(snapshot.id)), lowers=self._snapshots.lowers_of(snapshot),
            diff_id=diff_id, sync=sync,
        )  # fmt: skip

        def report(offset: int) -> None:
            ctx.progress(ApplyProgress(offset=offset, total=descriptor.size))

        return await self._pool.apply(job, report)


def target_of(mounts: list[Mount]) -> str:
    """The directory that what is written to a mount list ends up in. INVALID_ARGUMENT if it is read-only or unknown."""
    if len(mounts) == 1 and not mounts[0].target:
        mount = mounts[0]
        if mount.type == "overlay":
            for option in mount.options:
                if option.startswith("upperdir="):
                    return option.removeprefix("upperdir=")
        elif mount.type == "bind" and "ro" not in mount.options:
            return mount.source
    raise InvalidArgument("the mounts aren't those of one writable snapshot", hint="prepare an active snapshot")


def _extract_key(ctx: Context, request: UnpackLayer) -> str:
    return f"extract-{ctx.id} {request.name}"
