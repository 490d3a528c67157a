"""Layers computed from snapshots, on a bus: what they are, whose they are, and what is left when they fail."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ShoalError,
)
from shoal_bus.types import Mount

from tests.support import images
from tests.support.images import Layer, directory, file, whiteout
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import listing, mounted, write_blob

TAR = "application/vnd.oci.image.layer.v1.tar"
NAMES = ["overlayfs", "native"]


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content", "snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


async def unpack(client: Client, place: Path, layer: Layer, name: str, parent: str = "", on: str = "overlayfs") -> None:
    path, blob, diff_id = write_blob(place, layer)
    request = snapshot.UnpackLayer(name=name, parent=parent, descriptor=blob, path=str(path), diff_id=diff_id)
    await client.operate(snapshot.SNAPSHOT_UNPACK.on(on), request, timeout=60)


async def prepare(client: Client, key: str, parent: str = "", on: str = "overlayfs") -> list[Mount]:
    request = snapshot.PrepareSnapshot(key=key, parent=parent)
    return (await client.call(snapshot.SNAPSHOT_PREPARE.on(on), request)).mounts


async def view(client: Client, key: str, parent: str, on: str = "overlayfs") -> list[Mount]:
    return (await client.call(snapshot.SNAPSHOT_VIEW.on(on), snapshot.PrepareSnapshot(key=key, parent=parent))).mounts


async def compute(client: Client, lower: list[Mount], upper: list[Mount], **more: object) -> snapshot.ComputedDiff:
    request = snapshot.ComputeDiff(lower=lower, upper=upper, **more)  # type: ignore[arg-type]
    return await client.operate(snapshot.DIFF_COMPUTE, request, timeout=60)


async def blob(client: Client, digest: str) -> bytes:
    return b"".join([c.data async for c in client.stream(content.BLOB_READ, content.ReadBlob(digest=digest))])


async def ingests(client: Client) -> list[content.IngestStatus]:
    return await client.collect(content.INGEST_LIST, content.ListBlobs())


BASE = Layer([directory("d"), file("d/a", b"a"), file("d/b", b"b"), file("top", b"t")])


@pytest.mark.parametrize("on", NAMES)
@pytest.mark.parametrize("media_type", [TAR, f"{TAR}+gzip", f"{TAR}+zstd"])
async def test_a_layer_of_what_was_changed_becomes_a_blob_that_makes_it_again(
    client: Client, tmp_path: Path, on: str, media_type: str
) -> None:
    await unpack(client, tmp_path, BASE, "one", on=on)
    mounts = await prepare(client, "c", "one", on)
    with mounted(mounts, tmp_path) as root:
        (root / "d/a").unlink()
        (root / "d/new").write_bytes(os.urandom(2_000_000))
        expected = listing(root)
    below = await view(client, "v", "one", on)
    labels = {"containerd.io/gc.root": "now"}
    made = await compute(client, below, mounts, media_type=media_type, labels=labels)
    assert made.descriptor.media_type == media_type
    assert made.entries == 3
    data = await blob(client, made.descriptor.digest)
    assert (images.digest_of(data), len(data)) == (made.descriptor.digest, made.descriptor.size)
    info = await client.call(content.BLOB_INFO, content.BlobRequest(digest=made.descriptor.digest))
    assert info.labels == {**labels, "containerd.io/uncompressed": made.diff_id}
    assert made.descriptor.annotations == {"containerd.io/uncompressed": made.diff_id}
    assert await ingests(client) == []
    claim = await client.call(content.BLOB_CLAIM, content.ClaimBlob(digest=made.descriptor.digest))
    request = snapshot.UnpackLayer(
        name="two", parent="one", descriptor=made.descriptor, path=claim.path, diff_id=made.diff_id
    )
    await client.operate(snapshot.SNAPSHOT_UNPACK.on(on), request, timeout=60)
    with mounted(await view(client, "w", "two", on), tmp_path) as root:
        assert listing(root) == expected
    # The same again is the same blob, also of the views of what was committed.
    assert await compute(client, below, await view(client, "x", "two", on), media_type=media_type) == made


async def test_a_whole_snapshot_is_a_layer_upon_nothing(client: Client, tmp_path: Path) -> None:
    await unpack(client, tmp_path, BASE, "one")
    await unpack(client, tmp_path, Layer([whiteout("d/a"), file("e", b"e")]), "two", "one")
    made = await compute(client, [], await view(client, "v", "two"))
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(await blob(client, made.descriptor.digest)))) as archive:
        assert archive.getnames() == ["d", "d/b", "e", "top"]


async def test_mounts_of_others_are_not_read(node: TestNode, client: Client, tmp_path: Path) -> None:
    mine = await prepare(client, "mine")
    bind = mine[0]
    at = f"{node.root}/snapshot"
    hostile = [
        bind.model_copy(update={"source": "/etc"}),
        bind.model_copy(update={"source": f"{bind.source}/../../.."}),
        bind.model_copy(update={"source": f"{at}/overlayfs/snapshots/999/fs"}),
        Mount(type="overlay", source="overlay", options=[f"lowerdir={bind.source}:/etc"]),
        Mount(type="overlay", source="overlay", options=[f"lowerdir={bind.source}", "upperdir=/root", "workdir=/tmp"]),
        Mount(type="overlay", source="overlay", options=[f"lowerdir={bind.source}::/etc"]),
        Mount(type="proc", source="proc"),
    ]
    for mount in hostile:
        for lower, upper in (([], [mount]), ([mount], mine)):
            with pytest.raises(NotFound, match="no snapshot of this namespace"):
                await compute(client, lower, upper)
    with pytest.raises(NotFound):
        await compute(client.with_namespace("other"), [], mine)
    for wrong in ([], [*mine, *mine], [bind.model_copy(update={"target": "/x"})]):
        with pytest.raises((FailedPrecondition, InvalidArgument)):
            await compute(client, [], wrong)
    with pytest.raises(InvalidArgument, match="can't be made"):
        await compute(client, [], mine, media_type=f"{TAR}+xz")
    assert await ingests(client) == []


async def test_somebody_elses_ingest_is_left_alone(client: Client) -> None:
    await client.call(content.INGEST_WRITE, content.WriteIngest(ref="theirs", data=b"begun"))
    mounts = await prepare(client, "c")
    with pytest.raises(AlreadyExists, match="ingest theirs"):
        await compute(client, [], mounts, ref="theirs")
    assert [(i.ref, i.offset) for i in await ingests(client)] == [("theirs", 5)]
    assert (await compute(client, [], mounts, ref="mine")).entries == 0


def fill(mounts: list[Mount], size: int = 40 << 20) -> None:
    for number in range(8):
        (Path(mounts[0].source) / f"{number}").write_bytes(os.urandom(size // 8))


async def test_a_compute_that_nobody_wants_leaves_nothing(node: TestNode, client: Client) -> None:
    mounts = await prepare(client, "c")
    await asyncio.to_thread(fill, mounts)
    told: list[snapshot.ComputeProgress] = []
    request = snapshot.ComputeDiff(upper=mounts)
    computing = asyncio.create_task(client.operate(snapshot.DIFF_COMPUTE, request, on_progress=told.append))
    async with asyncio.timeout(20):
        while not await ingests(client):
            await asyncio.sleep(0.01)
    computing.cancel()
    with pytest.raises((asyncio.CancelledError, Cancelled)):
        await computing
    async with asyncio.timeout(20):
        while await ingests(client):
            await asyncio.sleep(0.02)
    below = psutil.Process(node.of("snapshot").pid).children(recursive=True)
    assert [p for p in below if p.name() == "shoal-worker"] == [], "it went with its work"


async def test_a_snapshot_that_goes_while_it_is_read_makes_no_layer(client: Client) -> None:
    mounts = await prepare(client, "c")
    await asyncio.to_thread(fill, mounts)
    computing = asyncio.create_task(compute(client, [], mounts))
    async with asyncio.timeout(20):
        while not await ingests(client):
            await asyncio.sleep(0.01)
    await client.call(snapshot.SNAPSHOT_REMOVE, snapshot.SnapshotRequest(key="c"))
    with pytest.raises(ShoalError) as error:
        await computing
    assert error.value.code.name in ("NOT_FOUND", "ABORTED")
    assert await ingests(client) == []
    assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ["snapshot", "content"])
async def test_a_compute_survives_a_kill_at_any_moment(node: TestNode, client: Client, victim: str) -> None:
    mounts = await prepare(client, "c")
    await asyncio.to_thread(fill, mounts)
    expected = await compute(client, [], mounts, media_type=TAR)
    await client.call(content.BLOB_DELETE, content.BlobRequest(digest=expected.descriptor.digest))
    for delay in (0.0, 0.03, 0.08, 0.15, 0.25):
        request = snapshot.ComputeDiff(upper=mounts, media_type=TAR)
        computing = asyncio.create_task(client.operate(snapshot.DIFF_COMPUTE, request, timeout=60, patience=20))
        await asyncio.sleep(delay)
        node.of(victim).kill()
        node.of(victim).start()
        assert await computing == expected
        assert len(await blob(client, expected.descriptor.digest)) == expected.descriptor.size
        assert await ingests(client) == []
        await client.call(content.BLOB_DELETE, content.BlobRequest(digest=expected.descriptor.digest))


@pytest.mark.parametrize("on", NAMES)
async def test_snapshotters_are_told_of(node: TestNode, client: Client, on: str) -> None:
    listed = await client.collect(snapshot.SNAPSHOTTER_LIST, snapshot.SnapshotterRequest())
    assert [s.name for s in listed] == NAMES, "btrfs isn't one here"
    info = await client.call(snapshot.SNAPSHOT_INFO.on(on), snapshot.SnapshotterRequest())
    assert info == next(s for s in listed if s.name == on)
    assert info.root == f"{node.root}/snapshot/{on}"
    assert info.mount_type == {"overlayfs": "overlay", "native": "bind"}[on]
    assert ("whole" in info.capabilities) == (on == "native")
    cleaned = await client.call(snapshot.SNAPSHOT_CLEANUP.on(on), snapshot.SnapshotterRequest())
    assert cleaned.directories == 0
