"""Images that are on a node without a pull: written through ingests, as an import or a build does it."""

from __future__ import annotations

from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.types import Descriptor

from tests.support.images import Image, digest_of

_PIECE = 256 * 1024


async def store(client: Client, image: Image, name: str) -> content.Image:
    """Writes all of an image, and its record."""
    await _store_tree(client, image)
    target = Descriptor(media_type=image.media_type, digest=image.digest, size=len(image.manifest))
    return await client.call(content.IMAGE_CREATE, content.CreateImage(name=name, target=target))


async def _store_tree(client: Client, image: Image) -> None:
    for one in image.platforms:
        await _store_tree(client, one)
    for _, data in image.blobs.values():
        await store_blob(client, data)
    await store_blob(client, image.manifest)


async def store_blob(client: Client, data: bytes) -> str:
    """Writes one blob, unless it is there; its digest."""
    digest = digest_of(data)
    if await client.collect(content.BLOB_LIST, content.ListBlobs(filters=[f"digest=={digest}"])):
        return digest
    for at in range(0, max(1, len(data)), _PIECE):
        piece = data[at : at + _PIECE]
        last = at + len(piece) == len(data)
        request = content.WriteIngest(ref=digest, offset=at, data=piece, total=len(data), expected=digest, commit=last)
        await client.call(content.INGEST_WRITE, request)
    return digest
