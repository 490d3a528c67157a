"""`IMAGE_IMPORT`: an archive taken apart in a worker, its blobs adopted, its images unpacked and recorded."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

from shoal_bus.api.content import ArchiveProgress, Image, ImportedImages, ImportImages
from shoal_bus.context import Context
from shoal_bus.errors import Aborted, NotFound

from shoal_content.archives.archive import Archive
from shoal_content.archives.operation import Tools
from shoal_content.archives.planning import Plan, Planning, Unpacking
from shoal_content.archives.work.load import Load
from shoal_content.archives.work.recompress import Recompress
from shoal_content.images.source import StoreSource
from shoal_content.labels import UNCOMPRESSED


class Imports:
    """`IMAGE_IMPORT`."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def run(self, ctx: Context, request: ImportImages) -> ImportedImages:
        """Takes the images of an archive, verifies and unpacks them."""
        planning = Planning(request)
        await self._tools.unpacker.require(ctx, *planning.snapshotters)
        async with self._tools.begun(ctx) as nonce:
            place = archive_place(self._tools.archives, request.archive)
            if ctx.resumed and _is_stream(place):
                raise Aborted("the archive's stream broke off, as the content service ended", hint="load it again")
            return await self._import(ctx, request, nonce, place, planning)

    async def undo(self, ctx: Context, request: ImportImages) -> None:
        """Takes away what an import brought that came to nothing."""
        await self._tools.undo(ctx)

    async def _import(
        self, ctx: Context, request: ImportImages, nonce: str, place: Path, planning: Planning
    ) -> ImportedImages:
        tools = self._tools
        directory = await tools.stagings.make(ctx.id)

        def report(offset: int, total: int) -> None:
            ctx.progress(ArchiveProgress(state="reading", bytes_done=offset, bytes_total=total))

        await tools.pool.load(Load(str(place), str(directory)), report)
        archive = await asyncio.to_thread(Archive, directory)
        if request.compress:
            await self._compress(ctx, archive, directory)
        plan_with = await asyncio.to_thread(planning.read, archive)
        plan = plan_with(StoreSource(tools.store, ctx.namespace))
        await self._adopt(ctx, archive, plan)
        for unpacking in plan.unpacks:
            await self._unpack(ctx, nonce, unpacking)
        images: list[Image] = []
        with tools.database.write(durable=True) as tx:
            images += [tools.put_image(tx, ctx, one.name, one.target, one.labels) for one in plan.images]
            tools.end(tx, ctx)
            imported = ImportedImages(images=images)
            ctx.answer(tx, imported)
        ctx.progress(ArchiveProgress(state="done"))
        await tools.collect(ctx)
        return imported

    async def _compress(self, ctx: Context, archive: Archive, directory: Path) -> None:
        """Has the plain layers of an archive compressed that has no manifests which name them."""
        layers = await asyncio.to_thread(archive.plain_layers)
        total, done = sum(layer.size for layer in layers), 0
        for at, layer in enumerate(layers):
            made = directory / f"compressed-{at}"

            def report(offset: int, _: int, before: int = done) -> None:
                ctx.progress(ArchiveProgress(state="compressing", bytes_done=before + offset, bytes_total=total))

            job = Recompress(str(layer.path), layer.digest, layer.size, layer.digest, "gzip", str(made))
            archive.replace(layer, made, *await self._tools.pool.recompress(job, report))
            done += layer.size

    async def _adopt(self, ctx: Context, archive: Archive, plan: Plan) -> None:
        total, done = sum(blob.size for blob in plan.blobs.values()), 0
        for digest, blob in plan.blobs.items():
            member = archive.member(digest)
            if member is not None:
                labels = {UNCOMPRESSED: member.uncompressed} if member.uncompressed else None
                await self._tools.stagings.adopt(ctx.id, ctx.namespace, member.path, digest, member.size, labels)
            else:
                self._tools.hold(ctx, [digest])
            done += blob.size
            ctx.progress(ArchiveProgress(state="storing", bytes_done=done, bytes_total=total))

    async def _unpack(self, ctx: Context, nonce: str, image: Unpacking) -> None:
        def report(done: int) -> None:
            ctx.progress(
                ArchiveProgress(
                    state="unpacking", name=image.name, bytes_done=sum(one.size for one in image.layers[:done]),
                    bytes_total=sum(one.size for one in image.layers),
                )
            )  # fmt: skip

        await self._tools.unpacker.unpack(
            ctx, nonce, image.name, image.snapshotter, image.layers, image.diff_ids, report
        )


def archive_place(directory: Path, name: str) -> Path:
    """Where an archive comes from or goes to. NOT_FOUND when nobody has put anything there."""
    place = directory / name
    try:
        place.lstat()
    except FileNotFoundError:
        raise NotFound(
            f"archive {name}: isn't in {directory}", hint="archives come and go on the node itself"
        ) from None
    return place


def _is_stream(place: Path) -> bool:
    try:
        return stat.S_ISFIFO(place.stat().st_mode)
    except OSError:
        return False
