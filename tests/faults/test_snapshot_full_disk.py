"""A full disk (a small ext4 on a loop device): RESOURCE_EXHAUSTED, nothing left, and all is well once there is room."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import ResourceExhausted

from tests.support.images import Layer, file
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import write_blob

MIB = 1 << 20


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    """A node whose root is a file system of 24 MiB and 4096 inodes."""
    disk, root = tmp_path / "disk", tmp_path / "root"
    root.mkdir()
    with disk.open("wb") as made:
        made.truncate(24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-N", "4096", "-m", "0", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk), str(root)], check=True)
    # Blobs are elsewhere, or there would be no room for them.
    (tmp_path / "content").mkdir()
    (root / "content").mkdir()
    subprocess.run(["mount", "--bind", str(tmp_path / "content"), str(root / "content")], check=True)
    try:
        with TestNode(tmp_path, natsd) as started:
            started.start("snapshot")
            yield started
    finally:
        subprocess.run(["umount", str(root / "content"), str(root)], check=True)


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def used(node: TestNode) -> tuple[int, int]:
    """Snapshots' bytes (rounded) and inodes on the small disk."""
    place = node.root / "snapshot" / "overlayfs"
    files = list(place.rglob("*"))
    return sum(f.lstat().st_blocks * 512 for f in files), len(files)


async def settled(node: TestNode, expected: tuple[int, int]) -> None:
    async with asyncio.timeout(20):
        while used(node) != expected:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "layer",
    [Layer([file("big", os.urandom(30 * MIB))], "none"), Layer([file(f"{n}", b"") for n in range(6_000)], "none")],
    ids=["bytes", "inodes"],
)
async def test_a_layer_that_does_not_fit_leaves_nothing(
    node: TestNode, client: Client, tmp_path: Path, layer: Layer
) -> None:
    before = used(node)
    path, blob, diff_id = write_blob(tmp_path, layer)
    request = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    for _ in range(3):
        with pytest.raises(ResourceExhausted, match="no space left") as error:
            await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)
        assert error.value.hint
        assert await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots()) == []
        await settled(node, before)
    mounts = (await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key="c"))).mounts
    apply = api.ApplyLayer(descriptor=blob, path=str(path), mounts=mounts)
    with pytest.raises(ResourceExhausted):
        await client.operate(api.DIFF_APPLY, apply, timeout=60)
    assert list(Path(mounts[0].source).iterdir()) == []
    small, blob, diff_id = write_blob(tmp_path, Layer([file("small", b"fits")]))
    request = api.UnpackLayer(name="two", descriptor=blob, path=str(small), diff_id=diff_id)
    assert (await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)).kind == "committed"


async def test_a_bomb_is_stopped_by_the_disk(node: TestNode, client: Client, tmp_path: Path) -> None:
    before = used(node)
    path, blob, diff_id = write_blob(tmp_path, Layer([file(f"{n}", bytes(8 * MIB)) for n in range(40)], "zstd"))
    assert path.stat().st_size < MIB
    request = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    with pytest.raises(ResourceExhausted, match="no space left"):
        await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)
    await settled(node, before)


async def test_a_disk_that_is_full_already_is_told_and_survived(node: TestNode, client: Client, tmp_path: Path) -> None:
    """Not even the database can grow."""
    path, blob, diff_id = write_blob(tmp_path, Layer([file("f", bytes(100_000))], "none"))
    filler = node.root / "filler"
    with filler.open("wb", buffering=0) as file_:
        size = MIB
        while size:
            try:
                file_.write(bytes(size))
            except OSError:
                size //= 2
    before = used(node)
    outcomes: list[api.Mounts | ResourceExhausted] = []
    for number in range(60):
        request = api.PrepareSnapshot(key=f"k{number}", labels={"x": "y" * 4000})
        try:
            outcomes.append(await client.call(api.SNAPSHOT_PREPARE, request, timeout=20))
        except ResourceExhausted as error:
            outcomes.append(error)
    assert any(isinstance(o, ResourceExhausted) for o in outcomes)
    unpack = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    with pytest.raises(ResourceExhausted):
        await client.operate(api.SNAPSHOT_UNPACK, unpack, timeout=60)
    made = sum(isinstance(o, api.Mounts) for o in outcomes)
    assert len(await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots())) == made
    filler.unlink()
    assert (await client.operate(api.SNAPSHOT_UNPACK, unpack, timeout=60)).kind == "committed"
    for snapshot in await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots()):
        await client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key=snapshot.key))
    async with asyncio.timeout(20):
        while used(node)[1] != before[1]:
            await asyncio.sleep(0.05)
