"""Layers into snapshots: unpacked into one of their own, or applied to one that a client prepared."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, TypeVar

from shoal_bus.api.snapshot import AppliedLayer, ApplyLayer, ApplyProgress, SnapshotInfo, UnpackLayer
from shoal_bus.context import Context
from shoal_bus.errors import Aborted, DataLoss, FailedPrecondition, InvalidArgument, NotFound, from_wire
from shoal_bus.together import in_thread, to_its_end
from shoal_bus.types import Descriptor, Mount

from shoal_snapshot import disk
from shoal_snapshot.apply.directories import attach
from shoal_snapshot.apply.errors import ApplyError, NeedsParent, StartedOver, Starved
from shoal_snapshot.apply.pool import Pool
from shoal_snapshot.apply.stream import hash_blob
from shoal_snapshot.apply.worker import Done, Job
from shoal_snapshot.leases import add_to_lease
from shoal_snapshot.overlayfs import FUSE_TYPE
from shoal_snapshot.processors import Processor, chain, programs, read_payloads
from shoal_snapshot.records import Snapshot
from shoal_snapshot.snapshots import Snapshots
from shoal_snapshot.syscalls import syncfs

P = ParamSpec("P")
T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
_UNGUESSABLE = ("claims", "following")
"""Where the content service has names for who was told them: to know a digest gives nobody a blob."""
PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"


class Layers:
    """What is done with layers in one snapshotter."""

    def __init__(
        self,
        snapshots: Snapshots,
        pool: Pool,
        content: Path,
        memory: Path,
        processors: Mapping[str, Processor] = MappingProxyType({}),
        payloads: Path = Path("/nonexistent"),
    ) -> None:
        """Blobs lie below `content`, the content service's own directory; no other path is looked at. `memory` is a
        directory of this service that those workers lock one at a time that need much of it. `processors` decompress
        the media types they are named for, with what lies in `payloads` for them."""
        self.snapshots = self._snapshots = snapshots
        self._records, self._db = snapshots.records, snapshots.db
        self._pool, self._content, self._memory = pool, content, memory
        self._processors, self._payloads = processors, payloads
        self._awaited: dict[tuple[str, str], asyncio.Event] = {}
        """Parents that layers wait for."""

    # ---------------------------------------------------------------------------------------------------------- unpack

    async def unpack(self, ctx: Context, request: UnpackLayer) -> SnapshotInfo:
        """The layer becomes the committed snapshot `name`; one that is there is the answer.

        It is extracted into an active snapshot of the request's own, so that nobody sees it before it is whole. What a
        dead copy began is dropped and begun anew: it can't be told how much of it was written.

        An early one whose parent isn't there yet is extracted without it, where the snapshotter can do that, and
        committed once digest and diff ID are right and the parent is there.

        The snapshot is there then, and on disk soon after (`settling`).
        """
        with self._snapshots.settling.unpacking():
            return await self._unpack(ctx, request)

    async def _unpack(self, ctx: Context, request: UnpackLayer) -> SnapshotInfo:
        key = _extract_key(ctx, request)
        await add_to_lease(ctx, self._snapshots.snapshotter.name, request.name)
        self._snapshots.remove_if_there(ctx.namespace, key)
        if ctx.resumed:
            await self._snapshots.settled()  # its room is needed again
        there = self._committed(ctx, request.name)
        if there is not None:
            return there
        waits = request.early and request.parent and self._committed(ctx, request.parent) is None
        if waits and self._snapshots.snapshotter.parallel:
            with suppress(NeedsParent):
                return await self._unpack_detached(ctx, request, key)
            ctx.log.info("unpack.on_its_parent", layer=request.descriptor.digest, snapshot=request.name)
        if waits:
            await self._parent(ctx, request)
        return await self._unpack_on_parent(ctx, request, key)

    async def _unpack_on_parent(self, ctx: Context, request: UnpackLayer, key: str) -> SnapshotInfo:
        while True:
            snapshot = await self._snapshots.add(ctx, key, "active", request.parent, {})
            with suppress(_Anew):
                async with self._abandoned_if_it_fails(snapshot):
                    job = self._job(request, snapshot, request.diff_id, growing=request.early)
                    await self._extract(ctx, request, job)
                    committed = self._commit(ctx, request, snapshot)
                return await self._outcome(ctx, request, key, committed)

    async def _unpack_detached(self, ctx: Context, request: UnpackLayer, key: str) -> SnapshotInfo:
        """NeedsParent: it can't be had so. Nothing is left then."""
        snapshot = await self._snapshots.add(ctx, key, "active", "", {})
        async with self._abandoned_if_it_fails(snapshot):
            job = replace(self._job(request, snapshot, request.diff_id, growing=True), detached=True)
            done = await self._extract(ctx, request, job)
            await self._attach(snapshot, await self._parent(ctx, request), job, done)
            committed = self._commit(ctx, request, snapshot, request.parent)
        return await self._outcome(ctx, request, key, committed)

    async def _attach(self, snapshot: Snapshot, parent: Snapshot, job: Job, done: Done) -> None:
        """Makes a layer that was extracted without the ones below it what it would be on top of them. NeedsParent where
        that is too much."""
        parents = [parent.id, *self._records.parents(parent)]
        self._snapshots.snapshotter.attach(snapshot.id, parents)
        if done.implied:
            lowers = [str(self._snapshots.snapshotter.layer(id)) for id in parents]
            implied = {os.fsencode(path): takes for path, takes in done.implied.items()}
            await _in_words(attach, job.root, lowers, implied)

    def _commit(
        self, ctx: Context, request: UnpackLayer, snapshot: Snapshot, parent: str | None = None
    ) -> SnapshotInfo | None:
        """None: somebody has committed another snapshot under that name meanwhile."""
        with self._db.write() as tx:
            if self._records.find(ctx.namespace, request.name) is not None:
                return None
            committed = self._snapshots.commit_in(tx, ctx, snapshot, request.name, request.labels, None, parent)
            tx.on_commit(lambda: self._comes(ctx.namespace, request.name))
            return committed.info()

    async def _outcome(
        self, ctx: Context, request: UnpackLayer, key: str, committed: SnapshotInfo | None
    ) -> SnapshotInfo:
        if committed is not None:
            return committed
        self._snapshots.remove_if_there(ctx.namespace, key)
        there = self._committed(ctx, request.name)
        if there is None:
            raise FailedPrecondition(f"snapshot {request.name}: came and went while it was unpacked", hint="try again")
        return there

    @asynccontextmanager
    async def _abandoned_if_it_fails(self, snapshot: Snapshot) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            await to_its_end(self._snapshots.abandon(snapshot))
            raise

    async def _parent(self, ctx: Context, request: UnpackLayer) -> Snapshot:
        """The parent of an early layer, as soon as it is committed. Whoever asked gives up if it doesn't come."""
        awaited = ctx.namespace, request.parent
        pause = _FIRST_PAUSE
        try:
            while self._committed(ctx, request.parent) is None:
                comes = self._awaited.setdefault(awaited, asyncio.Event())
                pause = min(2 * pause, _LONGEST_PAUSE)
                with suppress(TimeoutError):  # another copy may have committed it
                    async with asyncio.timeout(pause):
                        await comes.wait()
        finally:
            self._awaited.pop(awaited, None)
        return self._records.get(ctx.namespace, request.parent)

    def _comes(self, namespace: str, name: str) -> None:
        comes = self._awaited.pop((namespace, name), None)
        if comes is not None:
            comes.set()

    async def undo_unpack(self, ctx: Context, request: UnpackLayer) -> None:
        """Drops what a dead copy began and nobody wants any more."""
        self._snapshots.remove_if_there(ctx.namespace, _extract_key(ctx, request))

    def _committed(self, ctx: Context, name: str) -> SnapshotInfo | None:
        there = self._records.find(ctx.namespace, name)
        if there is not None and there.unsettled not in ("", self._snapshots.settling.boot):
            self._snapshots.settling.drop_lost()
            there = self._records.find(ctx.namespace, name)
        if there is not None and there.kind != "committed":
            raise FailedPrecondition(f"snapshot {name}: is there, but {there.kind}", hint="remove it, or commit it")
        if there is None:
            return None
        try:
            self._records.touch(there)
        except NotFound:  # it has just been collected
            return None
        return there.info()

    # ----------------------------------------------------------------------------------------------------------- apply

    async def apply(self, ctx: Context, request: ApplyLayer) -> AppliedLayer:
        """Applies a layer to what `mounts` describe: an active snapshot of this snapshotter and this namespace.

        It is written to the snapshot's own directory. One that was empty is empty again if this fails. Any other, as
        all are whose directory holds their parent's tree, is left with a part of the layer, and marked from before the
        first write on: it can be looked at and removed, and neither be committed nor have more layers applied to it.
        """
        if ctx.resumed:
            await self.undo_apply(ctx, request)
        snapshot = self._target(ctx, request.mounts)
        self._records.require_whole_layers(snapshot, ctx.id)
        job = self._job(request, snapshot, request.diff_id or "")
        await _in_words(job.blob.whole)  # one that isn't there changes nothing
        root = self._snapshots.snapshotter.layer(snapshot.id)
        with self._db.write() as tx:
            empty = not any(root.iterdir())
            tx.execute(
                "INSERT INTO applies (request_id, snapshot_id, was_empty) VALUES (?, ?, ?)",
                (ctx.id, snapshot.id, empty),
            )
            if not empty:
                self._records.require_whole_layers(snapshot, ctx.id)  # another may have begun meanwhile
                tx.execute("INSERT OR IGNORE INTO unfinished VALUES (?, ?)", (snapshot.id, ctx.id))
        try:
            done = await self._extract(ctx, request, replace(job, over=not empty))
            if request.sync:
                await in_thread(syncfs, str(root))
            with self._db.write() as tx:
                if self._records.by_id(ctx.namespace, snapshot.id) is None:
                    raise NotFound(f"snapshot {snapshot.key}: was removed while a layer was applied to it")
                uncompressed = Descriptor(media_type=PLAIN_LAYER, digest=done.diff_id, size=done.uncompressed)
                applied = AppliedLayer(descriptor=uncompressed, entries=done.entries)
                tx.execute("DELETE FROM applies WHERE request_id = ?", (ctx.id,))
                tx.execute("DELETE FROM unfinished WHERE request_id = ?", (ctx.id,))
                ctx.answer(tx, applied)
        except BaseException:
            await to_its_end(self.undo_apply(ctx, request))
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

    def _job(
        self, request: UnpackLayer | ApplyLayer, snapshot: Snapshot, diff_id: str, *, growing: bool = False
    ) -> Job:
        descriptor, base = request.descriptor, str(self._content)
        path = request.path.removeprefix(f"{base}/")
        place, _, name = path.partition("/")
        if path == request.path or place not in _UNGUESSABLE or "/" in name:
            path = ""  # it is none that the content service gave anyone, and not found
        through = chain(self._processors, descriptor.media_type)
        given = request.payloads if isinstance(request, ApplyLayer) else ""
        payloads = read_payloads(self._payloads, given) if given and through else {}
        return Job(
            base=base, path=path, digest=descriptor.digest, size=descriptor.size,
            media_type=through[-1].returns if through else descriptor.media_type,
            root=str(self._snapshots.snapshotter.layer(snapshot.id)), lowers=self._snapshots.lowers_of(snapshot),
            programs=programs(self._processors, descriptor.media_type, payloads),
            diff_id=diff_id, growing=growing, memory=str(self._memory), whole=self._snapshots.snapshotter.whole,
        )  # fmt: skip

    async def _extract(self, ctx: Context, request: UnpackLayer | ApplyLayer, job: Job) -> Done:
        """Has a worker extract a layer, as often as its blob starts over."""
        descriptor = request.descriptor

        def report(offset: int) -> None:
            ctx.progress(ApplyProgress(offset=offset, total=descriptor.size))

        while True:
            read = job.blob.identity()
            try:
                try:
                    done = await self._pool.apply(job, report)
                    if isinstance(request, UnpackLayer):
                        await self._verify(job, done.identity)
                    return done
                except (DataLoss, FailedPrecondition):
                    if job.growing and read is not None:
                        await self._verify(job, read)  # wrong bytes may be its writer's, who begins again then
                    raise
            except StartedOver:
                ctx.log.info("unpack.started_over", layer=descriptor.digest)
            except Starved:
                ctx.log.info("unpack.waits_for_all_of_it", layer=descriptor.digest)
                await self._whole(job)
            if job.whole:
                raise _Anew
            await in_thread(disk.empty, job.root)

    async def _verify(self, job: Job, read: tuple[int, int]) -> None:
        """Returns when the file that was `read` while it was written has its digest. StartedOver, ABORTED.

        Whoever writes it moves it to its place among the blobs once that is verified: it is the same file then. If
        another writer was faster, the file is hashed here.
        """
        blob = job.blob
        if not blob.growing:
            return
        algorithm, _, value = blob.digest.partition(":")
        placed = replace(blob, path=f"blobs/{algorithm}/{value}")
        began, hashed = time.monotonic(), False
        while True:
            current, place = blob.identity(), placed.identity()
            if place == read:
                return
            if current is None:
                raise Aborted(f"blob {blob.digest}: is no longer fetched")
            if current != read:
                raise StartedOver
            if place is not None and not hashed:
                with suppress(ApplyError):  # if it's wrong, its writer will find that, and begin again or give up
                    hashed = blob.whole()
                    if hashed and await in_thread(hash_blob, blob) == read:
                        return
            await asyncio.sleep(min(max(_FIRST_PAUSE, (time.monotonic() - began) / 8), _LONGEST_PAUSE))

    async def _whole(self, job: Job) -> None:
        """Returns when all of a growing blob is there. ABORTED when its writer gives up."""
        while True:
            try:
                if job.blob.whole():
                    return
            except ApplyError:
                raise Aborted(f"blob {job.digest}: is no longer fetched") from None
            await asyncio.sleep(_LONGEST_PAUSE)


class _Anew(Exception):
    """An extraction begins again, with a new snapshot: what lies below is in the old one, too."""


async def _in_words(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A function of `apply` in a thread, with what is wrong as the bus tells it."""
    try:
        return await in_thread(function, *args, **kwargs)
    except ApplyError as error:
        raise from_wire(error.code, error.message, error.hint) from None


def target_of(mounts: list[Mount]) -> str:
    """The directory that what is written to a mount list ends up in. INVALID_ARGUMENT if it is read-only or unknown."""
    if len(mounts) == 1 and not mounts[0].target:
        mount = mounts[0]
        if mount.type in ("overlay", FUSE_TYPE):
            for option in mount.options:
                if option.startswith("upperdir="):
                    return option.removeprefix("upperdir=")
        elif mount.type == "bind" and "ro" not in mount.options:
            return mount.source
    raise InvalidArgument("the mounts aren't those of one writable snapshot", hint="prepare an active snapshot")


def _extract_key(ctx: Context, request: UnpackLayer) -> str:
    return f"extract-{ctx.id} {request.name}"
