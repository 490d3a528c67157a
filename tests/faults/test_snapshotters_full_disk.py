"""A full disk under copies, commits and computed layers: RESOURCE_EXHAUSTED, nothing left, all is well with room."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import ResourceExhausted

from tests.support.disks import MIB, btrfs, disk
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

TAR = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture(params=["native", "btrfs"])
def on(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer, on: str) -> Iterator[TestNode]:
    (tmp_path / "place").mkdir()
    ext4 = ["mkfs.ext4", "-q", "-m", "0"]
    small = btrfs(tmp_path / "place", 128 * MIB) if on == "btrfs" else disk(tmp_path / "place", 64 * MIB, ext4)
    with small as place:
        (tmp_path / "root").symlink_to(place)
        with TestNode(tmp_path, natsd) as started:
            started.start("content", "snapshot")
            yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def free(node: TestNode) -> int:
    os.sync()
    status = os.statvfs(node.root)
    return status.f_bavail * status.f_frsize


def fill(path: Path) -> None:
    """Takes all the room there is."""
    with path.open("wb", buffering=0) as file:
        size = MIB
        while size >= 4096:
            try:
                file.write(os.urandom(size))
                os.fsync(file.fileno())
            except OSError:
                size //= 2


async def prepare(client: Client, on: str, key: str, parent: str = "") -> Path:
    request = api.PrepareSnapshot(key=key, parent=parent)
    mounts = (await client.call(api.SNAPSHOT_PREPARE.on(on), request, timeout=60)).mounts
    return Path(mounts[0].source)


@pytest.mark.parametrize("on", ["native"], indirect=True)
async def test_a_computed_layer_that_does_not_fit_leaves_nothing(node: TestNode, client: Client, on: str) -> None:
    place = await prepare(client, on, "a")
    await asyncio.to_thread((place / "big").write_bytes, os.urandom(free(node) * 6 // 10))
    mounts = (await client.call(api.SNAPSHOT_MOUNTS.on(on), api.SnapshotRequest(key="a"))).mounts
    request = api.ComputeDiff(upper=mounts, media_type=TAR)
    before = 0
    for _ in range(3):
        with pytest.raises(ResourceExhausted):
            await client.operate(api.DIFF_COMPUTE, request, timeout=60)
        assert await client.collect(content.INGEST_LIST, content.ListBlobs()) == []
        before = before or free(node)  # the first one may have made content's database larger
        async with asyncio.timeout(20):
            while free(node) < before - 2 * MIB:
                await asyncio.sleep(0.1)
    (place / "big").write_bytes(b"small")
    made = await client.operate(api.DIFF_COMPUTE, api.ComputeDiff(upper=mounts, media_type=TAR), timeout=60)
    assert made.entries == 1


async def test_a_full_disk_at_prepare_and_commit_is_told_and_survived(node: TestNode, client: Client, on: str) -> None:
    place = await prepare(client, on, "a")
    for number in range(200):
        (place / f"{number}").write_bytes(os.urandom(20_000))
    await client.call(api.SNAPSHOT_COMMIT.on(on), api.CommitSnapshot(key="a", name="one"), timeout=60)
    above = await prepare(client, on, "b", "one")
    filler = node.root / "filler"
    await asyncio.to_thread(fill, filler)
    outcomes = []
    asks = [
        *((api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key=f"c{n}", parent="one", labels={"x": "y" * 4000}))
          for n in range(8)),
        (api.SNAPSHOT_COMMIT, api.CommitSnapshot(key="b", name="two", labels={"x": "y" * 4000})),
    ]  # fmt: skip
    for verb, request in asks:
        try:
            await client.call(verb.on(on), request, timeout=60)  # type: ignore[arg-type]
        except ResourceExhausted as error:
            outcomes.append(error)
    if on == "native":
        assert len(outcomes) >= 8, "a copy needs room"
    filler.unlink()
    os.sync()
    kept = {s.key: s.kind for s in await client.collect(api.SNAPSHOT_LIST.on(on), api.ListSnapshots())}
    refused = len(outcomes) - ("two" not in kept)
    assert len(kept) == 2 + len(asks) - 1 - refused
    if "two" not in kept:
        assert len(list(above.iterdir())) == 200
        await client.call(api.SNAPSHOT_COMMIT.on(on), api.CommitSnapshot(key="b", name="two"), timeout=60)
    assert len(list((await prepare(client, on, "d", "two")).iterdir())) == 200
    await client.call(api.SNAPSHOT_CLEANUP.on(on), api.SnapshotterRequest(), timeout=60)
    listed = await client.collect(api.SNAPSHOT_LIST.on(on), api.ListSnapshots())
    assert len(list((node.root / "snapshot" / on / "snapshots").iterdir())) == len(listed)
