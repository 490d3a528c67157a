"""What of an image is here, what images take, and an image unpacked that wasn't: the verbs around a whole image."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence

from shoal_bus.api import snapshot as snapshots
from shoal_bus.api.content import (
    CheckImage,
    Image,
    ImageCheck,
    ImagesUsage,
    ImagesUsageRequest,
    ImageUsage,
    PlatformCheck,
    SnapshotterUsage,
    UnpackedImage,
    UnpackImage,
    UnpackProgress,
)
from shoal_bus.client import Client
from shoal_bus.context import Context
from shoal_bus.errors import FailedPrecondition, NotFound, ShoalError
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.archives.operation import Tools
from shoal_content.images import platforms
from shoal_content.images.selection import select
from shoal_content.images.source import Source, StoreSource

_PATIENCE_SECONDS = 2.0
_AT_ONCE = 16


class Checks:
    """`IMAGE_CHECK`, `IMAGE_USAGE` and `IMAGE_UNPACK`."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    # ---------------------------------------------------------------------------------------------------------- check

    async def check(self, ctx: Context, request: CheckImage) -> ImageCheck:
        """What of an image is here, for each of its platforms, and where that is unpacked."""
        image = self._tools.images.record(ctx.namespace, request.name)
        source = StoreSource(self._tools.store, ctx.namespace)
        entries = _manifests(source, image.target)
        checks = []
        for entry in entries:
            checks.append(_check(source, entry))
            await asyncio.sleep(0)  # each is parsed, and there may be many
        for check in checks:
            if check.chain_id:
                check.unpacked = [
                    name for name in request.snapshotters if await _has(ctx.client, name, check.chain_id) is not None
                ]
        images = [check for check in checks if check.kind != "attestation"]
        own = images
        if not (len(entries) == 1 and entries[0].digest == image.target.digest):
            at = platforms.best(platforms.wanted(""), [check.platform for check in images])
            own = [images[at]] if at is not None else []
        complete = bool(own) and all(check.complete for check in own)
        return ImageCheck(image=image, complete=complete, platforms=checks)

    # ---------------------------------------------------------------------------------------------------------- usage

    async def usage(self, ctx: Context, request: ImagesUsageRequest) -> ImagesUsage:
        """What images take, each for itself and all together."""
        tools, namespace = self._tools, ctx.namespace
        every = tools.images.every(namespace)
        if request.names:
            wanted: Sequence[Image] = [tools.images.record(namespace, name) for name in dict.fromkeys(request.names)]
        else:
            wanted = every
        source = StoreSource(tools.store, namespace)
        blobs: dict[str, dict[str, int]] = {}
        shared: Counter[str] = Counter()
        for image in every:
            # Two names of one target are one image: neither is the other one's reason to be kept.
            if image.target.digest not in blobs:
                blobs[image.target.digest] = _blobs(source, tools.trees.reachable(image.target))
                shared.update(blobs[image.target.digest].keys())
            await asyncio.sleep(0)
        snapshotted = _Snapshotted(ctx.client, request.snapshotters)
        images = []
        for image in wanted:
            own = blobs[image.target.digest]
            images.append(
                ImageUsage(
                    name=image.name,
                    size=sum(own.values()),
                    unique=sum(size for digest, size in own.items() if shared[digest] == 1),
                    blobs=len(own),
                    snapshots=await snapshotted.usage(_chains(source, image)),
                )
            )
        together = {digest: size for image in wanted for digest, size in blobs[image.target.digest].items()}
        return ImagesUsage(
            images=images, size=sum(together.values()), blobs=len(together), snapshots=snapshotted.together()
        )

    # --------------------------------------------------------------------------------------------------------- unpack

    async def unpack(self, ctx: Context, request: UnpackImage) -> UnpackedImage:
        """Unpacks an image whose blobs are here."""
        tools = self._tools
        await tools.unpacker.require(ctx, request.snapshotter)
        async with tools.begun(ctx) as nonce:
            image = tools.images.record(ctx.namespace, request.name)
            source = StoreSource(tools.store, ctx.namespace)
            selection = select(source, image.name, image.target, platform=request.platform, all_platforms=False)
            picked = selection.image
            if picked is None or picked.manifest is None or picked.config is None:
                raise FailedPrecondition(f"image {image.name}: has no files to unpack")
            tools.hold(ctx, selection.blobs)
            layers = picked.manifest.layers

            def report(done: int) -> None:
                ctx.progress(UnpackProgress(layers_done=done, layers_total=len(layers)))

            chain = await tools.unpacker.unpack(
                ctx, nonce, image.name, request.snapshotter, layers, picked.config.diff_ids, report
            )
            unpacked = UnpackedImage(image=image, chain_id=chain[-1] if chain else "")
            with tools.database.write(durable=True) as tx:
                there = tools.images.find(ctx.namespace, image.name)
                if there is None or there.target.digest != image.target.digest:
                    raise NotFound(f"image {image.name}: was removed while it was unpacked")
                tools.add_unpacked(tx, ctx, image.name, chain)
                tools.end(tx, ctx)
                ctx.answer(tx, unpacked)
        return unpacked

    async def undo_unpack(self, ctx: Context, request: UnpackImage) -> None:
        """Takes away the snapshots of an unpacking that came to nothing."""
        await self._tools.undo(ctx)


class _Snapshotted:
    """What chains take in some snapshotters; each snapshot is asked after once."""

    def __init__(self, client: Client, snapshotters: Iterable[str]) -> None:
        self._client, self._snapshotters = client, list(dict.fromkeys(snapshotters))
        self._known: dict[str, dict[str, snapshots.Usage | None]] = {name: {} for name in self._snapshotters}

    async def usage(self, chains: list[list[str]]) -> list[SnapshotterUsage]:
        """What these chains take together."""
        keys = list(dict.fromkeys(key for chain in chains for key in chain))
        found = []
        for name in self._snapshotters:
            known = self._known[name]
            unasked = [key for key in keys if key not in known]
            for at in range(0, len(unasked), _AT_ONCE):
                some = unasked[at : at + _AT_ONCE]
                answers = await asyncio.gather(*(_has(self._client, name, key) for key in some))
                known.update(zip(some, answers, strict=True))
            there = [usage for key in keys if (usage := known[key]) is not None]
            if there:
                found.append(_sum(name, there))
        return found

    def together(self) -> list[SnapshotterUsage]:
        """What all chains that were asked after take."""
        found = []
        for name, known in self._known.items():
            there = [usage for usage in known.values() if usage is not None]
            if there:
                found.append(_sum(name, there))
        return found


def _sum(name: str, there: list[snapshots.Usage]) -> SnapshotterUsage:
    size, inodes = sum(usage.size for usage in there), sum(usage.inodes for usage in there)
    return SnapshotterUsage(snapshotter=name, size=size, inodes=inodes, snapshots=len(there))


async def _has(client: Client, snapshotter: str, chain_id: str) -> snapshots.Usage | None:
    """What a snapshot takes, or None where there is none; UNAVAILABLE for a snapshotter that doesn't answer."""
    try:
        return await client.call(
            snapshots.SNAPSHOT_USAGE.on(snapshotter),
            snapshots.SnapshotRequest(key=chain_id),
            patience=_PATIENCE_SECONDS,
        )
    except NotFound:
        return None


def _blobs(source: Source, digests: Iterable[str]) -> dict[str, int]:
    """The sizes of those blobs that are here."""
    return {digest: size for digest in digests if (size := source.size(digest)) is not None}


def _manifests(source: Source, target: Descriptor, depth: int = 0) -> list[Descriptor]:
    """The manifests a target leads to, itself if it is one; what can't be read leads nowhere."""
    data = _read(source, target)
    try:
        if data is None or depth > 4 or media.kind_of(data, target.media_type) not in media.INDEXES:
            return [target]
        return [
            one
            for entry in media.read_entries(data)
            for one in (_manifests(source, entry, depth + 1) if entry.media_type in media.INDEXES else [entry])
        ][: media.MAX_MANIFESTS]
    except FailedPrecondition:
        return [target]


def _check(source: Source, entry: Descriptor) -> PlatformCheck:
    check = PlatformCheck(manifest=entry, platform=entry.platform, total=entry.size)
    if media.is_attestation(entry):
        check.kind = "attestation"
    data = _read(source, entry)
    if data is None:
        check.missing = [entry]
        return check
    check.present, check.size = True, entry.size
    try:
        if check.kind == "image" and media.is_artifact(data):
            check.kind = "artifact"
        children = media.parts(data)
    except FailedPrecondition:
        return check  # it is no manifest: nothing can be complete about it
    for child in {child.digest: child for child in children}.values():
        check.total += child.size
        if source.size(child.digest) == child.size:
            check.size += child.size
        else:
            check.missing.append(child)
    check.layers = len(children) - 1
    check.complete = not check.missing
    if check.kind == "image" and children[0] not in check.missing:
        try:
            config = media.read_config(source.open(children[0].digest))
        except ShoalError:
            return check
        chain = media.chain_ids(config.diff_ids)
        check.chain_id = chain[-1] if chain else ""
        check.platform = check.platform or config.platform
    return check


def _chains(source: Source, image: Image) -> list[list[str]]:
    """The chain IDs of all the image's platforms whose configurations are here."""
    found = []
    for entry in _manifests(source, image.target):
        data = _read(source, entry)
        try:
            if data is None or media.is_attestation(entry) or media.is_artifact(data):
                continue
            config = media.read_manifest(data).config
            if source.size(config.digest) is not None:
                found.append(media.chain_ids(media.read_config(source.open(config.digest)).diff_ids))
        except ShoalError:
            continue
    return found


def _read(source: Source, descriptor: Descriptor) -> bytes | None:
    """A document, or None where it isn't here, or isn't one."""
    size = source.size(descriptor.digest)
    if size is None or size != descriptor.size or size > media.MAX_MANIFEST_BYTES:
        return None
    return source.open(descriptor.digest)
