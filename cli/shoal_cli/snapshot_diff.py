"""`snapshot diff`: what a snapshot changed, as a layer. What is made for that is under a lease, and goes with it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from pathlib import Path

from shoal_bus.api import content, snapshot
from shoal_bus.blobs import download
from shoal_bus.client import Client
from shoal_bus.errors import InvalidArgument
from shoal_bus.message import now
from shoal_bus.types import Mount

from shoal_cli.blobs import save

_LONGEST = timedelta(hours=1)
_EXPIRE = "containerd.io/gc.expire"
MEDIA_TYPES = {
    "none": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}


async def write_diff(
    client: Client, snapshotter: str, key: str, lower: str, compression: str, output: Path | None
) -> snapshot.ComputedDiff:
    """Writes the layer that makes `key` of `lower` (of its parent, where that is empty) to a file or to our output."""
    if compression not in MEDIA_TYPES:
        raise InvalidArgument(f"--compression {compression!r}: must be one of {', '.join(MEDIA_TYPES)}")
    info = await client.call(snapshot.SNAPSHOT_STAT.on(snapshotter), snapshot.SnapshotRequest(key=key))
    expires = (now() + _LONGEST).isoformat()
    async with _lease(client, expires) as leased:
        below = lower or info.parent
        request = snapshot.ComputeDiff(
            lower=await _mounts(leased, snapshotter, below) if below else [],
            upper=await _mounts(leased, snapshotter, key),
            media_type=MEDIA_TYPES[compression],
            labels={_EXPIRE: expires},
        )
        made = await leased.operate(snapshot.DIFF_COMPUTE, request)
        if output is not None:
            await save(leased, made.descriptor.digest, output)
        else:
            async with aclosing(download(leased, made.descriptor.digest)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        # Nothing but its label keeps the layer from being collected, and that says: in an hour.
        expired = content.UpdateBlob(
            digest=made.descriptor.digest, labels={_EXPIRE: now().isoformat()}, fields=[f"labels.{_EXPIRE}"]
        )
        await leased.call(content.BLOB_UPDATE, expired)
    return made


@asynccontextmanager
async def _lease(client: Client, expires: str) -> AsyncIterator[Client]:
    lease = await client.call(content.LEASE_CREATE, content.CreateLease(labels={_EXPIRE: expires}))
    try:
        yield client.with_lease(lease.id)
    finally:
        await client.call(content.LEASE_DELETE, content.DeleteLease(id=lease.id, sync=True))


async def _mounts(client: Client, snapshotter: str, key: str) -> list[Mount]:
    """How a snapshot is mounted: an active one or a view as it is, a committed one by a view of it."""
    info = await client.call(snapshot.SNAPSHOT_STAT.on(snapshotter), snapshot.SnapshotRequest(key=key))
    if info.kind != "committed":
        request = snapshot.SnapshotRequest(key=key)
        return (await client.call(snapshot.SNAPSHOT_MOUNTS.on(snapshotter), request)).mounts
    view = snapshot.PrepareSnapshot(key=f"diff-{client.lease}-{key}", parent=key)
    return (await client.call(snapshot.SNAPSHOT_VIEW.on(snapshotter), view)).mounts
