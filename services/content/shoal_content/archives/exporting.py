"""`IMAGE_EXPORT`: images as an OCI image layout in a tar archive, with Docker's `manifest.json` beside it.

The same images make the same bytes: members are sorted, owned by root and of 1970, documents are compact.
"""

from __future__ import annotations

import json
import stat
from typing import Any

from shoal_bus import image_reference as reference
from shoal_bus.api.content import ArchiveProgress, ExportedImages, ExportImages
from shoal_bus.context import Context
from shoal_bus.errors import Aborted, InvalidArgument
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.archives.archive import CONTAINERD_NAME, REF_NAME
from shoal_content.archives.importing import archive_place
from shoal_content.archives.operation import Tools
from shoal_content.archives.work.save import Save
from shoal_content.images import platforms
from shoal_content.images.selection import Picked, Selection, select
from shoal_content.images.source import StoreSource


class Exports:
    """`IMAGE_EXPORT`."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def run(self, ctx: Context, request: ExportImages) -> ExportedImages:
        """Writes images to an archive."""
        for text in (request.platform, *request.platforms):
            platforms.wanted(text)
        tools = self._tools
        async with tools.begun(ctx):
            place = archive_place(tools.archives, request.archive)
            if ctx.resumed and stat.S_ISFIFO(place.stat().st_mode):
                raise Aborted("the archive's stream broke off, as the content service ended", hint="save it again")
            named = [self._select(ctx, request, name) for name in sorted(set(request.names))]
            blobs = {digest: blob for _, one in named for digest, blob in one.blobs.items()}
            tools.hold(ctx, blobs)

            def report(done: int, total: int) -> None:
                ctx.progress(ArchiveProgress(state="writing", bytes_done=done, bytes_total=total))

            members = self._members(named, blobs, docker=not request.skip_docker_manifest)
            await tools.pool.save(Save(str(place), members), report)
            exported = ExportedImages(names=[name for name, _ in named], size=sum(blob.size for blob in blobs.values()))
            with tools.database.write() as tx:
                tools.end(tx, ctx)
                ctx.answer(tx, exported)
        return exported

    async def undo(self, ctx: Context, request: ExportImages) -> None:
        """Gives back what an export held; its archive is whoever's that asked for it."""
        await self._tools.undo(ctx)

    def _select(self, ctx: Context, request: ExportImages, name: str) -> tuple[str, Selection]:
        image = self._tools.images.record(ctx.namespace, name)
        selection = select(
            StoreSource(self._tools.store, ctx.namespace),
            name,
            image.target,
            platform=request.platform,
            all_platforms=request.all_platforms,
            only=request.platforms,
            unpackable=False,
            skip_non_distributable=request.skip_non_distributable,
        )
        if not selection.whole and not request.keep_index and selection.image is not None:
            # What is in an archive is whole: not an index most of whose images are missing.
            return name, _alone(selection, selection.image)
        return name, selection

    def _members(
        self, named: list[tuple[str, Selection]], blobs: dict[str, Descriptor], *, docker: bool
    ) -> list[dict[str, Any]]:
        members: list[dict[str, Any]] = [{"name": "blobs"}]
        members += [{"name": f"blobs/{algorithm}"} for algorithm in sorted({d.partition(":")[0] for d in blobs})]
        members += [
            {
                "name": _blob_name(digest),
                "path": str(self._tools.store.path(digest)),
                "digest": digest,
                "size": blob.size,
            }
            for digest, blob in blobs.items()
        ]
        index = {
            "schemaVersion": 2,
            "mediaType": media.OCI_INDEX,
            "manifests": [_entry(name, selection.target) for name, selection in named],
        }
        members.append({"name": "index.json", "text": _compact(index)})
        manifests = _docker_manifests(named, blobs) if docker else []
        if manifests:
            members.append({"name": "manifest.json", "text": _compact(manifests)})
        members.append({"name": "oci-layout", "text": _compact({"imageLayoutVersion": "1.0.0"})})
        return sorted(members, key=lambda member: str(member["name"]))


def _alone(selection: Selection, image: Picked) -> Selection:
    """The image of one platform, without the index that it was chosen from."""
    assert image.manifest is not None
    blobs = [image.descriptor, image.manifest.config, *image.manifest.layers]
    return Selection(
        target=image.descriptor,
        blobs={blob.digest: blob for blob in blobs if blob.digest in selection.blobs},
        manifests=[image],
        image=image,
    )


def _entry(name: str, target: Descriptor) -> dict[str, Any]:
    """An image in the layout's index, under its whole name and its tag (image-spec, annotations.md)."""
    try:
        tag = reference.parse(name).tag
    except InvalidArgument:
        tag = ""  # an image may be called anything here
    annotations = {CONTAINERD_NAME: name} | ({REF_NAME: tag} if tag else {})
    return media.as_json(target.model_copy(update={"annotations": target.annotations | annotations}))


def _docker_manifests(named: list[tuple[str, Selection]], blobs: dict[str, Descriptor]) -> list[dict[str, Any]]:
    """`docker load`'s own list: each image that it can run here, once, with all its tags."""
    found: dict[str, dict[str, Any]] = {}
    for name, selection in named:
        image = selection.image
        if image is None or image.manifest is None or any(one.digest not in blobs for one in image.manifest.layers):
            continue
        entry = found.setdefault(
            image.descriptor.digest,
            {
                "Config": _blob_name(image.manifest.config.digest),
                "RepoTags": [],
                "Layers": [_blob_name(layer.digest) for layer in image.manifest.layers],
            },
        )
        if "@" not in name:
            entry["RepoTags"].append(name)
    return list(found.values())


def _blob_name(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _compact(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"))
