"""`IMAGE_IMPORT`: an archive taken apart in a worker, its blobs adopted, its images unpacked and recorded."""

from __future__ import annotations

import asyncio
import stat
import time
from pathlib import Path

from shoal_bus import image_reference as reference
from shoal_bus.api.content import ArchiveProgress, Image, ImportedImages, ImportImages
from shoal_bus.context import Context
from shoal_bus.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.types import Descriptor

from shoal_content.archives.archive import Archive, Found
from shoal_content.archives.operation import Tools
from shoal_content.archives.work.errors import shown
from shoal_content.archives.work.load import Load
from shoal_content.images import platforms
from shoal_content.images.selection import Selection, Source, StoreSource, select


class Imports:
    """`IMAGE_IMPORT`."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def run(self, ctx: Context, request: ImportImages) -> ImportedImages:
        """Takes the images of an archive, verifies and unpacks them."""
        platforms.wanted(request.platform)  # one that can't be read is refused before anything is
        base = reference.parse(request.base_name) if request.base_name else None
        names = Names(
            base, digests=request.digests, date=time.strftime("%Y-%m-%d", time.gmtime()),
            others=request.other_names, skip_named=request.skip_named_digests,
        )  # fmt: skip
        async with self._tools.begun(ctx) as nonce:
            place = archive_place(self._tools.archives, request.archive)
            if ctx.resumed and _is_stream(place):
                raise Aborted("the archive's stream broke off, as the content service ended", hint="load it again")
            return await self._import(ctx, request, nonce, place, names)

    async def undo(self, ctx: Context, request: ImportImages) -> None:
        """Takes away what an import brought that came to nothing."""
        await self._tools.undo(ctx)

    async def _import(
        self, ctx: Context, request: ImportImages, nonce: str, place: Path, names: Names
    ) -> ImportedImages:
        tools = self._tools
        directory = await tools.stagings.make(ctx.id)

        def report(offset: int, total: int) -> None:
            ctx.progress(ArchiveProgress(state="reading", bytes_done=offset, bytes_total=total))

        await tools.pool.load(Load(str(place), str(directory)), report)
        archive = await asyncio.to_thread(Archive, directory)
        wanted = names.of(await asyncio.to_thread(archive.images))
        source = _Both(archive, StoreSource(tools.store, ctx.namespace))
        selections = {
            digest: select(
                source, names_[0], target, platform=request.platform, all_platforms=request.all_platforms
            )
            for digest, (target, names_) in wanted.items()
        }  # fmt: skip
        await self._adopt(ctx, archive, list(selections.values()))
        chains: dict[str, list[str]] = {}
        for digest, selection in selections.items():
            chains[digest] = await self._unpack(ctx, request, nonce, wanted[digest][1][0], selection)
        images: list[Image] = []
        with tools.database.write(durable=True) as tx:
            for digest, (target, names_) in wanted.items():
                images += [tools.put_image(tx, ctx, name, target, request.labels, chains[digest]) for name in names_]
            tools.end(tx, ctx)
            imported = ImportedImages(images=images)
            ctx.answer(tx, imported)
        ctx.progress(ArchiveProgress(state="done"))
        await tools.collect(ctx)
        return imported

    async def _adopt(self, ctx: Context, archive: Archive, selections: list[Selection]) -> None:
        blobs = {digest: blob for selection in selections for digest, blob in selection.blobs.items()}
        total, done = sum(blob.size for blob in blobs.values()), 0
        for digest, blob in blobs.items():
            member = archive.member(digest)
            if member is not None:
                await self._tools.stagings.adopt(ctx.id, ctx.namespace, member.path, digest, member.size)
            else:
                self._tools.hold(ctx, [digest])
            done += blob.size
            ctx.progress(ArchiveProgress(state="storing", bytes_done=done, bytes_total=total))

    async def _unpack(
        self, ctx: Context, request: ImportImages, nonce: str, name: str, selection: Selection
    ) -> list[str]:
        image = selection.image
        if image is None or image.manifest is None or image.config is None or not request.snapshotter:
            return []

        def report(done: int) -> None:
            ctx.progress(
                ArchiveProgress(state="unpacking", name=name, bytes_done=sum(one.size for one in layers[:done]),
                                bytes_total=sum(one.size for one in layers))
            )  # fmt: skip

        layers = image.manifest.layers
        return await self._tools.unpacker.unpack(
            ctx, nonce, name, request.snapshotter, layers, image.config.diff_ids, report
        )


class Names:
    """Which names the images of an archive get: their own, or, of those with less than that, `base` with it."""

    def __init__(
        self,
        base: reference.Reference | None,
        *,
        digests: bool,
        date: str,
        others: bool = False,
        skip_named: bool = False,
    ) -> None:
        self._base, self._digests, self._others, self._skip_named = base, digests, others, skip_named
        self._prefix = f"{base.domain}/{base.path}" if base is not None else f"import-{date}"

    def of(self, found: list[Found]) -> dict[str, tuple[Descriptor, list[str]]]:
        """The images that get a name, by digest, each with its names. FAILED_PRECONDITION when none does."""
        wanted: dict[str, tuple[Descriptor, list[str]]] = {}
        for one in found:
            names = [full for name in one.names if (full := self._full(name))]
            if not one.names and self._base is not None and len(found) == 1:
                names = [self._parsed(self._prefix)]
            if self._digests and not (names and self._skip_named):
                repositories = {name.partition("@")[0].rpartition(":")[0] or name for name in names}
                repositories = repositories or ({self._prefix} if not one.names or self._base is None else set())
                names += [self._parsed(f"{name}@{one.target.digest}") for name in sorted(repositories)]
            if names:
                wanted[one.target.digest] = one.target, list(dict.fromkeys(names))
        if not wanted:
            called = ", ".join(shown(name) for one in found for name in one.names[:2]) or "nothing"
            raise FailedPrecondition(
                f"the archive's images aren't called anything that is wanted, but {called}",
                hint="give a --base-name, or --digests",
            )
        return wanted

    def _full(self, name: str) -> str:
        if not any(sign in name for sign in "/:@"):
            return self._parsed(f"{self._prefix}:{name}")
        parsed = self._parsed(name)
        repository = parsed.partition("@")[0].removesuffix(":" + parsed.rpartition(":")[2])
        if self._base is not None and not self._others and f"{repository}/".startswith(f"{self._prefix}/") is False:
            return ""
        return parsed

    @staticmethod
    def _parsed(name: str) -> str:
        try:
            return str(reference.parse(name))
        except InvalidArgument as error:
            raise FailedPrecondition(f"the archive has an image of a name that can't be: {error.message}") from None


class _Both:
    """An archive's blobs, and those that the namespace sees already: an archive may have what is new alone."""

    def __init__(self, archive: Archive, store: Source) -> None:
        self._archive, self._store = archive, store

    def size(self, digest: str) -> int | None:
        size = self._archive.size(digest)
        return size if size is not None else self._store.size(digest)

    def open(self, digest: str) -> bytes:
        return self._archive.open(digest) if self._archive.member(digest) is not None else self._store.open(digest)


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
