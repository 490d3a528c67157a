"""`IMAGE_CONVERT`: an image with its layers compressed anew and its documents rewritten, as an image of its own.

Documents keep their fields and the fields' order, so that the same image converts to the same bytes. Attestations come
along: they are found by what their image became, and go on saying what they said, which is of the one it was made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal_bus.api.content import ConvertImage, ConvertProgress, Image
from shoal_bus.context import Context
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.together import gather
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.archives.operation import Tools
from shoal_content.archives.work.compression import HEAD, compression_of
from shoal_content.archives.work.recompress import Recompress
from shoal_content.blobs.layout import digest_of
from shoal_content.images import platforms
from shoal_content.images.selection import Picked, Selection, select
from shoal_content.images.source import StoreSource
from shoal_content.labels import UNCOMPRESSED

_DOCKER_CONFIG, _OCI_CONFIG = (
    "application/vnd.docker.container.image.v1+json",
    "application/vnd.oci.image.config.v1+json",
)
_DOCKER_TO_OCI = {
    media.DOCKER_LIST: media.OCI_INDEX,
    media.DOCKER_MANIFEST: media.OCI_MANIFEST,
    _DOCKER_CONFIG: _OCI_CONFIG,
}
_OCI_FOREIGN, _DOCKER_FOREIGN = (
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)


class Conversions:
    """`IMAGE_CONVERT`."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def run(self, ctx: Context, request: ConvertImage) -> Image:
        """Makes an image of another one."""
        platforms.wanted(request.platform)
        if request.compression is None and not request.oci:
            raise InvalidArgument("nothing to convert", hint="give a compression, or oci")
        tools = self._tools
        await tools.unpacker.require(ctx, request.snapshotter)
        async with tools.begun(ctx) as nonce:
            source = tools.images.record(ctx.namespace, request.source)
            selection = select(
                StoreSource(tools.store, ctx.namespace), request.source, source.target,
                platform=request.platform, all_platforms=request.all_platforms,
            )  # fmt: skip
            tools.hold(ctx, selection.blobs)
            directory = await tools.stagings.make(ctx.id)
            target = await _Conversion(tools, ctx, request, directory, selection).run()
            image = selection.image
            if request.snapshotter and image is not None and image.manifest and image.config:
                await tools.unpacker.unpack(
                    ctx, nonce, request.source, request.snapshotter, image.manifest.layers, image.config.diff_ids,
                    lambda _: None,
                )  # fmt: skip
            with tools.database.write(durable=True) as tx:
                made = tools.put_image(tx, ctx, request.name, target, request.labels)
                tools.end(tx, ctx)
                ctx.answer(tx, made)
        await tools.collect(ctx)
        return made

    async def undo(self, ctx: Context, request: ConvertImage) -> None:
        """Takes away what a conversion made that came to nothing."""
        await self._tools.undo(ctx)


class _Conversion:
    """One conversion."""

    def __init__(
        self, tools: Tools, ctx: Context, request: ConvertImage, directory: Path, selection: Selection
    ) -> None:
        self._tools, self._ctx, self._request = tools, ctx, request
        self._directory, self._selection = directory, selection
        self._images = [one for one in selection.manifests if one.manifest is not None and one.config is not None]
        self._others = [one for one in selection.manifests if one not in self._images]
        self._layers = {
            (layer.digest, diff_id): layer
            for one in self._images
            if one.manifest is not None and one.config is not None
            for layer, diff_id in zip(one.manifest.layers, one.config.diff_ids, strict=True)
        }
        self._made: dict[tuple[str, str], tuple[str, int, str]] = {}
        """Digest, size and compression of what each layer became."""
        self._offsets: dict[tuple[str, str], int] = {}

    async def run(self) -> Descriptor:
        if not self._images:
            raise FailedPrecondition(f"image {self._request.source}: has no layers that could be converted")
        await gather(*(self._layer(layer, diff_id) for (_, diff_id), layer in self._layers.items()))
        made = {one.descriptor.digest: await self._manifest(one) for one in self._images}
        target = self._selection.target
        if target.digest in made:
            return made[target.digest]
        others = {one.descriptor.digest: await self._other(one, made) for one in self._others}
        if not self._selection.whole and len(made) == 1 and not others:
            (alone,) = made.values()
            return alone
        return await self._index(target, made | others)

    async def _manifest(self, image: Picked) -> Descriptor:
        document = json.loads(image.data)
        assert image.manifest is not None
        assert image.config is not None
        config = document["config"]
        config["mediaType"] = self._type(config["mediaType"])
        for entry, layer, diff_id in zip(document["layers"], image.manifest.layers, image.config.diff_ids, strict=True):
            digest, size, compression = self._made[layer.digest, diff_id]
            entry["mediaType"] = self._layer_type(layer.media_type, compression)
            if digest != layer.digest:
                entry.pop("urls", None)  # those are of the layer as it was
                entry.pop("data", None)
            entry["digest"], entry["size"] = digest, size
        media_type = self._type(media.kind_of(image.data, image.descriptor.media_type))
        document["mediaType"] = media_type
        return (await self._document(media_type, document)).model_copy(
            update={"platform": image.descriptor.platform, "annotations": image.descriptor.annotations}
        )

    async def _other(self, other: Picked, made: Mapping[str, Descriptor]) -> Descriptor:
        """An attestation, or another artifact, as it is; where it names an image by `subject`, what that became."""
        document, found = json.loads(other.data), other.descriptor
        subject = document.get("subject")
        if isinstance(subject, dict) and subject.get("digest") in made:
            document["subject"] = subject | _pointing_at(made[subject["digest"]])
            written = await self._document(media.kind_of(other.data, found.media_type), document)
            found = written.model_copy(update={"platform": found.platform, "annotations": found.annotations})
        attested = made.get(found.annotations.get(media.ATTESTED, ""))
        if attested is not None:
            annotations = found.annotations | {media.ATTESTED: attested.digest}
            found = found.model_copy(update={"annotations": annotations})
        return found

    async def _index(self, target: Descriptor, made: Mapping[str, Descriptor]) -> Descriptor:
        data = self._tools.store.open(self._ctx.namespace, target.digest)
        document = json.loads(data)
        kept = [entry for entry in document["manifests"] if entry["digest"] in made]
        within = made.keys() - {entry["digest"] for entry in kept}  # of indexes in this one
        document["manifests"] = [_entry(entry, made[entry["digest"]]) for entry in kept]
        document["manifests"] += [media.as_json(made[digest]) for digest in sorted(within)]
        media_type = self._type(media.kind_of(data, target.media_type))
        document["mediaType"] = media_type
        return await self._document(media_type, document)

    async def _document(self, media_type: str, document: dict[str, Any]) -> Descriptor:
        data = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        digest = digest_of(data)
        path = self._directory / digest.partition(":")[2]
        path.write_bytes(data)
        await self._tools.stagings.adopt(self._ctx.id, self._ctx.namespace, path, digest, len(data))
        return Descriptor(media_type=media_type, digest=digest, size=len(data))

    async def _layer(self, layer: Descriptor, diff_id: str) -> None:
        key, wanted = (layer.digest, diff_id), self._request.compression
        path = self._tools.store.path(layer.digest)
        with path.open("rb") as file:
            compression = compression_of(file.read(HEAD))
        self._layer_type(layer.media_type, wanted or compression)  # what has no name isn't made
        if wanted is None or wanted == compression:
            self._tell(key, layer.size)
            self._made[key] = layer.digest, layer.size, compression
            return
        made = self._directory / f"layer-{len(self._offsets)}"
        self._tell(key, 0)
        job = Recompress(str(path), layer.digest, layer.size, diff_id, wanted, str(made))
        digest, size = await self._tools.pool.recompress(job, lambda offset, _: self._tell(key, offset))
        await self._tools.stagings.adopt(self._ctx.id, self._ctx.namespace, made, digest, size, {UNCOMPRESSED: diff_id})
        self._made[key] = digest, size, wanted
        self._tell(key, layer.size)

    def _tell(self, layer: tuple[str, str], offset: int) -> None:
        self._offsets[layer] = offset
        self._ctx.progress(
            ConvertProgress(
                layers_done=len(self._made),
                layers_total=len(self._layers),
                bytes_done=sum(self._offsets.values()),
                bytes_total=sum(one.size for one in self._layers.values()),
            )
        )

    def _type(self, media_type: str) -> str:
        return _DOCKER_TO_OCI.get(media_type, media_type) if self._request.oci else media_type

    def _layer_type(self, media_type: str, compression: str) -> str:
        foreign = media_type in media.NON_DISTRIBUTABLE
        if not self._request.oci and media_type.startswith("application/vnd.docker."):
            if compression == "zstd":
                raise FailedPrecondition(
                    f"image {self._request.source}: Docker's media types have none for zstd", hint="add --oci"
                )
            return (_DOCKER_FOREIGN if foreign else media.DOCKER_LAYER) + ("" if compression == "none" else ".gzip")
        return (_OCI_FOREIGN if foreign else media.OCI_LAYER) + ("" if compression == "none" else f"+{compression}")


def _entry(entry: dict[str, Any], target: Descriptor) -> dict[str, Any]:
    """An index's entry, with what it points at now, and what that is about."""
    changed = entry | _pointing_at(target)
    if media.ATTESTED in target.annotations:
        changed["annotations"] = entry["annotations"] | {media.ATTESTED: target.annotations[media.ATTESTED]}
    return changed


def _pointing_at(target: Descriptor) -> dict[str, Any]:
    """What of a descriptor has to change for it to be another one's."""
    return {"mediaType": target.media_type, "digest": target.digest, "size": target.size}
