"""Pulls: reference, index, platform, manifest, then configuration and layers, downloaded side by side and unpacked.

A layer is unpacked by the snapshot service while it comes, beside the others (`following`); it is committed there once
its bytes are verified here and the layers below it are committed. The image's record is the last thing to be written,
durably, in the transaction that ends the pull. A pull that fails or is cancelled leaves nothing that wasn't there
before, no half of a blob either; one whose copy of this service died is taken up by the next, where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from shoal_bus import image_reference as reference
from shoal_bus.api import snapshot as snapshots
from shoal_bus.api.content import Image, PullImage
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import Cancelled, NotFound, ShoalError
from shoal_bus.image_reference import Reference
from shoal_bus.together import gather
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.blobs.following import Following
from shoal_content.blobs.store import Store
from shoal_content.collection.collect import Collector
from shoal_content.images import platforms
from shoal_content.images.records import Images
from shoal_content.images.tree import check, choose_manifest
from shoal_content.registry.registries import Registries
from shoal_content.registry.resolver import Resolver
from shoal_content.transfer.beyond import Beyond
from shoal_content.transfer.fetch import Fetcher
from shoal_content.transfer.holds import Holds
from shoal_content.transfer.progress import Progress
from shoal_content.transfer.snapshotters import Snapshotters

_UNPACK_TRIES = 5


class Pulls:
    """`IMAGE_PULL`."""

    def __init__(
        self,
        database: Database,
        store: Store,
        images: Images,
        holds: Holds,
        fetcher: Fetcher,
        following: Following,
        collector: Collector,
        registries: Registries,
        snapshotters: Snapshotters,
    ) -> None:
        self.registries, self.snapshotters = registries, snapshotters
        self.db, self.store, self.images, self.holds = database, store, images, holds
        self.fetcher, self.following, self.collector = fetcher, following, collector

    async def pull(self, ctx: Context, request: PullImage) -> Image:
        """Fetches an image, verifies and unpacks it."""
        wanted = reference.parse(request.name)
        for text in (request.platform, *request.platforms):
            platforms.wanted(text)  # one that can't be read is refused before anything is asked for
        await self.snapshotters.require(ctx, request.snapshotter)
        progress = Progress(str(wanted), ctx.progress)
        resolver = self.registries.resolver(wanted, request, waiting=progress.waiting)
        nonce = self.holds.begin(ctx.id, ctx.namespace, request.save_as or str(wanted), ctx.lease)
        try:
            async with resolver:
                return await _Pull(self, ctx, request, wanted, resolver, nonce, progress).run()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and ctx.draining.is_set():
                raise  # the next copy goes on where this one stopped
            await self._undo_and_say(ctx, request)
            raise

    async def undo(self, ctx: Context, request: PullImage) -> None:
        """Takes away what a pull brought that came to nothing."""
        nonce = self.holds.nonce(ctx.id)
        self.holds.fail(ctx.id)
        if nonce:
            self.following.forget(nonce)
        await self.collector.after_deletion(wait=True, asked=False)

    async def _undo_and_say(self, ctx: Context, request: PullImage) -> None:
        try:
            await self.undo(ctx, request)
        except Exception:
            # What the pull failed with is its caller's; the sweep undoes what is left (`Holds.dead`).
            ctx.log.exception("pull.undo_failed", image=request.name)


class _Pull:
    """One pull."""

    def __init__(
        self, pulls: Pulls, ctx: Context, request: PullImage, wanted: Reference, resolver: Resolver, nonce: str,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._pulls, self._ctx, self._request = pulls, ctx, request
        self._wanted, self._resolver, self._nonce = wanted, resolver, nonce
        self._progress = progress
        self._platform = request.platform
        self._slots = asyncio.Semaphore(request.max_concurrent_downloads)

    async def run(self) -> Image:
        self._progress.resolving()
        target, data = await self._resolver.resolve(self._wanted)
        beyond = Beyond(self._resolver, self._wanted, self._keep, self._fetch_beyond)
        manifest = await self._choose(target, data, beyond)
        if manifest is not None:
            self._progress.layers(manifest.layers)
            config = await self._config(manifest)
            check(str(self._wanted), manifest, config, self._platform)
            await self._layers(manifest.layers, config.diff_ids)
        if target.media_type in media.INDEXES:
            await self._others(beyond, media.read_entries(data))
        return await self._record(target)

    async def _others(self, beyond: Beyond, entries: Sequence[Descriptor]) -> None:
        """What is wanted of an index besides what was chosen of it."""
        if self._request.all_platforms:
            await beyond.manifests(entries)
            return
        asked = [platforms.parse(text) for text in self._request.platforms]
        fitting = [one for one in entries if one.platform is not None and platforms.same(one.platform, *asked)]
        await beyond.manifests(fitting)
        if self._request.all_metadata:
            await beyond.manifests(entries, layers=False)

    async def _choose(self, target: Descriptor, data: bytes, beyond: Beyond) -> media.Manifest | None:
        """Keeps the target and, where it is an index, the manifest for the platform; None: there is none to unpack."""
        name = str(self._wanted)
        if target.media_type in media.INDEXES:
            await self._keep(target, data)
            try:
                chosen = self._chosen(name, media.read_index(data))
            except NotFound:
                if self._request.all_platforms and not self._request.platform:
                    return None
                raise
            data, target = await self._resolver.manifest(self._wanted, chosen), chosen
            beyond.leave_out(chosen)
        if media.is_artifact(data):
            await self._keep(target, data)
            await beyond.blobs_of(data)
            return None
        manifest = media.read_manifest(data)
        await self._keep(target, data)
        return manifest

    def _chosen(self, name: str, offered: list[Descriptor]) -> Descriptor:
        """The manifest for the platform, or for the first of several that there is."""
        request = self._request
        several = request.platforms if request.platforms and not request.platform else [request.platform]
        for text in several[:-1]:
            with suppress(NotFound):
                chosen = choose_manifest(name, offered, text)
                self._platform = text
                return chosen
        self._platform = several[-1]
        return choose_manifest(name, offered, several[-1])

    async def _fetch_beyond(self, descriptor: Descriptor) -> None:
        at = self._progress.beyond(descriptor)

        def report(arrived: int) -> None:
            if at is not None:
                self._progress.layer(at, "downloading", arrived=arrived)

        fetched = await self._fetch(descriptor, report)
        if at is not None:
            self._progress.layer(at, "done" if fetched else "exists", arrived=descriptor.size)

    async def _keep(self, descriptor: Descriptor, data: bytes) -> None:
        await self._pulls.fetcher.keep(self._ctx.id, self._ctx.namespace, descriptor, data)

    async def _config(self, manifest: media.Manifest) -> media.Config:
        await self._fetch(manifest.config)
        return media.read_config(self._pulls.store.open(self._ctx.namespace, manifest.config.digest))

    async def _fetch(
        self,
        descriptor: Descriptor,
        report: Callable[[int], None] = lambda _: None,
        begun: Callable[[Path], None] = lambda _: None,
    ) -> bool:
        return await self._pulls.fetcher.fetch(
            self._ctx.id, self._ctx.namespace, self._resolver, self._wanted, descriptor, self._slots, report, begun
        )

    # --------------------------------------------------------------------------------------------------------- layers

    async def _layers(self, layers: Sequence[Descriptor], diff_ids: Sequence[str]) -> None:
        chain = media.chain_ids(diff_ids)
        unpacks = [
            snapshots.UnpackLayer(
                name=chain[at],
                parent=chain[at - 1] if at else "",
                descriptor=layer,
                path=str(self._pulls.following.path(self._nonce, at)),
                diff_id=diff_ids[at],
                early=True,
            )
            for at, layer in enumerate(layers)
        ]
        there = await self._unpacked(chain) if self._request.snapshotter else len(chain)
        await gather(*(self._layer(at, unpack, there=at < there) for at, unpack in enumerate(unpacks)))
        self._pulls.following.forget(self._nonce)

    async def _layer(self, at: int, unpack: snapshots.UnpackLayer, *, there: bool) -> None:
        """Fetches a layer and has it unpacked meanwhile, unless its snapshot is `there`, or none is wanted."""
        begun = asyncio.Event()

        def follow(file: Path) -> None:
            if not there:
                self._pulls.following.point(Path(unpack.path), file)
                begun.set()

        async with asyncio.TaskGroup() as group:
            download = group.create_task(self._download(at, unpack.descriptor, follow))
            if not there:
                await begun.wait()
                await self._unpack(at, unpack, download)
                await download
                self._progress.layer(at, "done", offset=unpack.descriptor.size)
        if there and self._request.snapshotter:
            self._progress.layer(at, "exists")

    async def _download(self, at: int, layer: Descriptor, follow: Callable[[Path], None]) -> None:
        def report(arrived: int) -> None:
            self._progress.layer(at, "downloading", arrived=arrived)

        fetched = await self._fetch(layer, report, follow)
        self._progress.layer(at, "downloaded" if fetched else "exists", arrived=layer.size)

    async def _unpack(self, at: int, request: snapshots.UnpackLayer, download: asyncio.Task[None]) -> None:
        """Has the snapshot service make a layer a snapshot."""

        def report(progress: snapshots.ApplyProgress) -> None:
            if download.done():
                self._progress.layer(at, "extracting", offset=progress.offset)

        verb = snapshots.SNAPSHOT_UNPACK.on(self._request.snapshotter)
        for attempt in range(_UNPACK_TRIES):
            try:
                await self._ctx.operate(verb, request, step=f"{self._nonce}.{at}.{attempt}", on_progress=report)
                return
            except Cancelled:
                # A copy of ours that was stopped, or away for too long, had it cancelled: this is another try.
                if attempt == _UNPACK_TRIES - 1:
                    raise
            except ShoalError as error:
                message = f"{self._wanted}: layer {request.descriptor.digest}: {error.message}"
                raise type(error)(message, hint=error.hint) from None

    async def _unpacked(self, chain: Sequence[str]) -> int:
        """Holds the layers' snapshots; says how many of them, from the lowest up, are there already."""
        snapshotter, namespace = self._request.snapshotter, self._ctx.namespace
        # In this order: a collection that hasn't seen that they are held sees that they have been looked at.
        self._pulls.holds.hold_snapshots(self._ctx.id, namespace, snapshotter, *chain)
        if chain and await self._is_there(chain[-1]):
            return len(chain)  # and so are those that it lies on
        for at, chain_id in enumerate(chain):
            if not await self._is_there(chain_id):
                return at
        return 0

    async def _is_there(self, chain_id: str) -> bool:
        stat = snapshots.SNAPSHOT_STAT.on(self._request.snapshotter)
        try:
            await self._ctx.client.call(stat, snapshots.SnapshotRequest(key=chain_id), patience=30.0)
        except NotFound:
            return False
        return True

    # --------------------------------------------------------------------------------------------------------- record

    async def _record(self, target: Descriptor) -> Image:
        """The image's record, and the end of this pull; what only the old record needed goes."""
        pulls, ctx, name = self._pulls, self._ctx, self._request.save_as or str(self._wanted)
        with pulls.db.write(durable=True) as tx:
            old = pulls.images.find(ctx.namespace, name)
            labels = (old.labels if old is not None else {}) | self._request.labels
            image = pulls.images.put(tx, ctx.namespace, name, target, labels, ctx.id)
            pulls.holds.succeed(tx, ctx.id, ctx.namespace, name, ctx.lease)
            ctx.answer(tx, image)
        self._progress.done()
        if old is not None and old.target.digest != target.digest:
            await pulls.collector.after_deletion(wait=True, asked=False)
        return image
