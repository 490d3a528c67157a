"""The snapshot service is killed while it copies whole trees: what was asked is done once, or not at all."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import AlreadyExists

from tests.support.disks import MIB, btrfs
from tests.support.images import Layer, directory, file, whiteout
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import listing, mounted, write_blob

NAMES = ["native", "btrfs"]
FILES = 3_000
BASE = Layer([directory("d"), *(file(f"d/{n}", bytes([n % 251]) * 2_000) for n in range(FILES))], "zstd")


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    (tmp_path / "place").mkdir()
    with btrfs(tmp_path / "place", 512 * MIB) as place:
        (tmp_path / "root").symlink_to(place)
        with TestNode(tmp_path, natsd) as started:
            started.start("snapshot")
            yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


async def unpack(client: Client, tmp_path: Path, layer: Layer, name: str, parent: str, on: str) -> None:
    path, blob, diff_id = write_blob(tmp_path, layer)
    request = api.UnpackLayer(name=name, parent=parent, descriptor=blob, path=str(path), diff_id=diff_id)
    await client.operate(api.SNAPSHOT_UNPACK.on(on), request, timeout=60, patience=20)


async def whole(node: TestNode, client: Client, on: str, expected: dict[str, str]) -> None:
    """The snapshots are these (key to kind), each has its directory, and there is nothing else on disk."""
    place = node.root / "snapshot" / on
    found = {s.key: s.kind for s in await client.collect(api.SNAPSHOT_LIST.on(on), api.ListSnapshots())}
    assert found == expected
    async with asyncio.timeout(20):
        while list((place / "trash").iterdir()):
            await asyncio.sleep(0.02)
    assert len(list((place / "snapshots").iterdir())) == len(expected)
    listed = subprocess.run(["btrfs", "subvolume", "list", str(node.root)], check=True, capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == (len(expected) if on == "btrfs" else 0)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("on", NAMES)
async def test_a_prepare_survives_a_kill_at_any_moment(node: TestNode, client: Client, tmp_path: Path, on: str) -> None:
    await unpack(client, tmp_path, BASE, "base", "", on)
    expected = {"base": "committed"}
    for number, delay in enumerate((0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.22, 0.3)):
        request = api.PrepareSnapshot(key=f"k{number}", parent="base")
        preparing = asyncio.create_task(
            client.call(api.SNAPSHOT_PREPARE.on(on), request, timeout=60, patience=20, id=f"p{number}")
        )
        await asyncio.sleep(delay)
        node.of("snapshot").kill()
        node.of("snapshot").start()
        mounts = (await preparing).mounts
        expected[f"k{number}"] = "active"
        assert len(list((Path(mounts[0].source) / "d").iterdir())) == FILES
        await whole(node, client, on, expected)
        again = await client.call(api.SNAPSHOT_PREPARE.on(on), request, id=f"p{number}")
        assert again.mounts == mounts
        with pytest.raises(AlreadyExists):
            await client.call(api.SNAPSHOT_PREPARE.on(on), request)


@pytest.mark.timeout(180)
async def test_what_nobody_asks_for_again_is_finished_or_dropped(
    node: TestNode, client: Client, tmp_path: Path
) -> None:
    """The client is gone, too. Whoever starts next finishes the copy, or takes away what there is of it."""
    await unpack(client, tmp_path, BASE, "base", "", "native")
    request = api.PrepareSnapshot(key="left", parent="base")
    for _ in range(3):
        preparing = asyncio.create_task(client.call(api.SNAPSHOT_PREPARE.on("native"), request, timeout=60))
        place = node.root / "snapshot/native/snapshots"
        async with asyncio.timeout(10):
            while len(list(place.glob("*/fs/d/*"))) <= FILES:
                await asyncio.sleep(0.005)
        workers = psutil.Process(node.of("snapshot").pid).children()
        node.of("snapshot").kill()
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing
        assert psutil.wait_procs(workers, timeout=10)[1] == []
        node.of("snapshot").start()
        async with asyncio.timeout(30):
            while "left" not in {
                s.key async for s in client.stream(api.SNAPSHOT_LIST.on("native"), api.ListSnapshots())
            }:
                await asyncio.sleep(0.1)
        await whole(node, client, "native", {"base": "committed", "left": "active"})
        await client.call(api.SNAPSHOT_REMOVE.on("native"), api.SnapshotRequest(key="left"))
        await whole(node, client, "native", {"base": "committed"})


@pytest.mark.timeout(180)
@pytest.mark.parametrize("on", NAMES)
async def test_an_unpack_on_a_copy_survives_a_kill_at_any_moment(
    node: TestNode, client: Client, tmp_path: Path, on: str
) -> None:
    await unpack(client, tmp_path, BASE, "base", "", on)
    change = Layer([whiteout(f"d/{n}") for n in range(0, FILES, 3)] + [file(f"d/new{n}", b"x") for n in range(500)])
    expected, contents = {"base": "committed"}, None
    for number, delay in enumerate((0.02, 0.08, 0.15, 0.25, 0.4, 0.6)):
        unpacking = asyncio.create_task(unpack(client, tmp_path, change, f"l{number}", "base", on))
        await asyncio.sleep(delay)
        node.of("snapshot").kill()
        node.of("snapshot").start()
        await unpacking
        expected[f"l{number}"] = "committed"
        await whole(node, client, on, expected)
        view = await client.call(api.SNAPSHOT_VIEW.on(on), api.PrepareSnapshot(key="v", parent=f"l{number}"))
        with mounted(view.mounts, tmp_path) as root:
            found = listing(root)
        contents = contents or found
        assert found == contents, f"after a kill {delay} s into it"
        assert len(found) == FILES * 2 // 3 + 500 + 2
        await client.call(api.SNAPSHOT_REMOVE.on(on), api.SnapshotRequest(key="v"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("on", NAMES)
async def test_a_commit_and_a_removal_survive_a_kill_at_any_moment(
    node: TestNode, client: Client, tmp_path: Path, on: str
) -> None:
    await unpack(client, tmp_path, BASE, "base", "", on)
    for number, delay in enumerate((0.0, 0.005, 0.01, 0.02, 0.04, 0.08)):
        prepare = api.PrepareSnapshot(key="k", parent="base")
        mounts = (await client.call(api.SNAPSHOT_PREPARE.on(on), prepare, timeout=60)).mounts
        (Path(mounts[0].source) / "mine").write_bytes(os.urandom(100_000))
        for verb, request in (
            (api.SNAPSHOT_COMMIT, api.CommitSnapshot(key="k", name="n")),
            (api.SNAPSHOT_REMOVE, api.SnapshotRequest(key="n")),
        ):
            asking = asyncio.create_task(
                client.call(verb.on(on), request, timeout=60, patience=20, id=f"{verb.verb}-{number}")  # type: ignore[arg-type]
            )
            await asyncio.sleep(delay)
            node.of("snapshot").kill()
            node.of("snapshot").start()
            await asking
            expected = {"base": "committed", "n": "committed"} if verb is api.SNAPSHOT_COMMIT else {"base": "committed"}
            await whole(node, client, on, expected)
