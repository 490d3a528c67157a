"""Pushes: blobs side by side, those that the registry lacks; then the manifests, and last the one that has the tag.

A push changes nothing on this node but the blobs' labels that say where they are, so there is nothing to undo: one that
a dead copy began is begun again, and finds what is there already.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence

from shoal_bus import image_reference as reference
from shoal_bus.api.content import Image, PushedImage, PushImage
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import DataLoss, InvalidArgument, NotFound
from shoal_bus.image_reference import Reference
from shoal_bus.together import gather
from shoal_bus.types import Descriptor

from shoal_content.blobs.store import Store
from shoal_content.images import platforms
from shoal_content.images.records import Images
from shoal_content.registry import sources
from shoal_content.registry.registries import Registries
from shoal_content.registry.resolver import Resolver
from shoal_content.transfer.holds import Holds
from shoal_content.transfer.push_plan import Plan, Planner
from shoal_content.transfer.push_progress import Pushing

_CHUNK = 1 << 20
_MOST_MOUNTS = 3


class Pushes:
    """`IMAGE_PUSH`."""

    def __init__(self, database: Database, store: Store, images: Images, holds: Holds, registries: Registries) -> None:
        self.db, self.store, self.images, self.holds, self.registries = database, store, images, holds, registries

    async def push(self, ctx: Context, request: PushImage) -> PushedImage:
        """Pushes an image; nothing of it is collected meanwhile."""
        image = self._record(ctx.namespace, request.name)
        to = destination(request)
        platforms.wanted(request.platform)  # one that can't be read is refused before anything is asked for
        progress = Pushing(str(to), ctx.progress)
        progress.preparing()
        planner = Planner(self.store, ctx.namespace, image.name)
        plan = await planner.plan(image.target, request.platform, all_platforms=request.all_platforms)
        if to.digest and to.digest != plan.target.digest:
            raise InvalidArgument(
                f"{to}: what would be pushed has digest {plan.target.digest}",
                hint="push it under a tag, or without one",
            )
        self.holds.begin(ctx.id, ctx.namespace)
        try:
            for one in [plan.target, *plan.blobs, *(one for level in plan.manifests for one in level)]:
                self.holds.hold_blob(ctx.id, ctx.namespace, one.digest)
                await asyncio.sleep(0)
            resolver = self.registries.resolver(to, request, push=True, waiting=progress.waiting)
            async with resolver:
                await _Push(self, ctx, request, to, planner, plan, resolver, progress).run()
        except BaseException as error:
            if not (isinstance(error, asyncio.CancelledError) and ctx.draining.is_set()):
                await self.undo(ctx, request)  # the next copy holds the same things for the same request
            raise
        pushed = PushedImage(name=str(to), target=plan.target)
        with self.db.write() as tx:
            digests = [plan.target.digest, *(one.digest for one in plan.blobs)]
            sources.remember(tx, ctx.namespace, digests, to)
            ctx.answer(tx, pushed)
        await self.undo(ctx, request)
        progress.done()
        return pushed

    async def undo(self, ctx: Context, request: PushImage) -> None:
        """Lets go of what a push held."""
        self.holds.fail(ctx.id)

    def _record(self, namespace: str, name: str) -> Image:
        image = self.images.find(namespace, name)
        if image is not None:
            return image
        try:
            return self.images.record(namespace, str(reference.parse(name)))
        except InvalidArgument:
            raise NotFound(f"image {name}: not found", hint="`shoal images` lists what there is") from None


def destination(request: PushImage) -> Reference:
    """Where a push goes. INVALID_ARGUMENT."""
    return reference.parse(request.destination or request.name)


class _Push:
    """One push."""

    def __init__(
        self, pushes: Pushes, ctx: Context, request: PushImage, to: Reference, planner: Planner, plan: Plan,
        resolver: Resolver, progress: Pushing,
    ) -> None:  # fmt: skip
        self._pushes, self._ctx, self._to, self._planner, self._plan = pushes, ctx, to, planner, plan
        self._resolver, self._progress = resolver, progress
        self._slots = asyncio.Semaphore(request.max_concurrent_uploads)

    async def run(self) -> None:
        plan = self._plan
        self._progress.blobs(plan.blobs, plan.skipped)
        await self._absent(plan.absent)
        await gather(*[self._blob(one) for one in plan.blobs])
        self._progress.naming()
        for level in plan.manifests:
            await gather(*[self._manifest(one) for one in level])
        await self._resolver.put_manifest(
            self._to, plan.target, self._planner.data(plan.target), self._to.tag if not self._to.digest else ""
        )
        if self._to.tag and self._to.digest:
            await self._resolver.put_manifest(self._to, plan.target, self._planner.data(plan.target), self._to.tag)

    async def _absent(self, manifests: Sequence[Descriptor]) -> None:
        """What isn't here must be there."""
        for one in manifests:
            if not await self._resolver.exists(self._to, one, manifest=True):
                which = f" for {one.platform}" if one.platform else ""
                raise NotFound(
                    f"image {self._to}: {one.digest}{which} is neither on this node nor in the registry",
                    hint="pull all platforms first, or push one",
                )

    async def _manifest(self, descriptor: Descriptor) -> None:
        async with self._slots:
            if not await self._resolver.exists(self._to, descriptor, manifest=True):
                await self._resolver.put_manifest(self._to, descriptor, self._planner.data(descriptor))

    async def _blob(self, descriptor: Descriptor) -> None:
        async with self._slots:
            if await self._resolver.exists(self._to, descriptor):
                self._progress.blob(descriptor.digest, "exists", descriptor.size)
            elif await self._mounted(descriptor):
                self._progress.blob(descriptor.digest, "mounted", descriptor.size)
            else:
                await self._upload(descriptor)

    async def _mounted(self, descriptor: Descriptor) -> bool:
        labels = self._pushes.store.labels(self._ctx.namespace, descriptor.digest)
        for repository in sources.repositories(labels, self._to)[:_MOST_MOUNTS]:
            if await self._resolver.mount(self._to, descriptor, repository):
                return True
        return False

    async def _upload(self, descriptor: Descriptor) -> None:
        digest = descriptor.digest
        self._progress.blob(digest, "uploading", 0)
        fd = self._open(descriptor)
        try:

            async def source(offset: int) -> AsyncGenerator[bytes, None]:
                while data := await asyncio.to_thread(os.pread, fd, _CHUNK, offset):
                    yield data
                    offset += len(data)

            await self._resolver.upload(
                self._to, descriptor, source, lambda sent: self._progress.blob(digest, "uploading", sent)
            )
        finally:
            os.close(fd)
        self._progress.blob(digest, "done", descriptor.size)

    def _open(self, descriptor: Descriptor) -> int:
        """A blob's file: of one that is removed meanwhile, too, all can be read."""
        store, namespace = self._pushes.store, self._ctx.namespace
        if not store.sees(namespace, descriptor.digest):
            raise NotFound(f"{self._to}: blob {descriptor.digest} isn't on this node", hint="pull the image again")
        fd = os.open(store.path(descriptor.digest), os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(fd).st_size
        if size != descriptor.size:
            os.close(fd)
            raise DataLoss(f"{self._to}: blob {descriptor.digest} has {size} bytes here, and should {descriptor.size}")
        return fd
