"""Unpacked layers come to the disk after they are there, and whatever happens before that costs no more than to unpack
them again."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content
from shoal_bus.api import runtime as runtime_api
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import NotFound
from shoal_bus.types import Stdio

from tests.support import images
from tests.support.images import Layer, file
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import running
from tests.support.runtime import runtime_node
from tests.support.snapshotter_suite import write_blob

MIB = 1 << 20


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


async def unpack(client: Client, directory: Path, layer: Layer, name: str, parent: str = "") -> None:
    path, blob, diff_id = write_blob(directory, layer)
    request = api.UnpackLayer(name=name, parent=parent, descriptor=blob, path=str(path), diff_id=diff_id)
    await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)


def rows(node: TestNode) -> dict[str, tuple[bool, int]]:
    """Of each snapshot whether it is settled, and its recorded inodes."""
    with sqlite3.connect(f"file:{node.root}/snapshot/metadata.db?mode=ro", uri=True) as database:
        return {
            key: (not unsettled, inodes)
            for key, unsettled, inodes in database.execute("SELECT key, unsettled, inodes FROM snapshots")
        }


async def all_settled(node: TestNode) -> None:
    async with asyncio.timeout(20):
        while not all(settled for settled, _ in rows(node).values()):
            await asyncio.sleep(0.02)


def cut_the_power(node: TestNode) -> None:
    """Has what isn't settled be of another boot."""
    node.of("snapshot").kill()
    with sqlite3.connect(node.root / "snapshot" / "metadata.db") as database:
        database.execute("UPDATE snapshots SET unsettled = 'another boot' WHERE unsettled != ''")
    database.close()


def hold_settling(node: TestNode) -> None:
    """Has the layers that are there be as they were before they were settled."""
    node.of("snapshot").kill()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with sqlite3.connect(node.root / "snapshot" / "metadata.db") as database:
        database.execute("UPDATE snapshots SET unsettled = ?, inodes = 0 WHERE kind = 'committed'", (boot,))
    database.close()


async def test_what_a_layer_takes_is_told_before_and_after(node: TestNode, client: Client, tmp_path: Path) -> None:
    node.start("snapshot")
    await unpack(client, tmp_path, Layer([file(f"f{n}", b"x") for n in range(9)]), "one")
    before = await client.call(api.SNAPSHOT_USAGE, api.SnapshotRequest(key="one"))
    await all_settled(node)
    assert rows(node) == {"one": (True, 10)}
    assert await client.call(api.SNAPSHOT_USAGE, api.SnapshotRequest(key="one")) == before
    assert before.inodes == 10


async def test_what_lies_on_a_layer_waits_for_it(node: TestNode, client: Client, tmp_path: Path) -> None:
    node.start("snapshot")
    await unpack(client, tmp_path, Layer([file("one")]), "one")
    for n, verb in enumerate((api.SNAPSHOT_PREPARE, api.SNAPSHOT_VIEW)):
        await unpack(client, tmp_path, Layer([file(f"two{n}")]), f"two{n}", "one")
        await client.call(verb, api.PrepareSnapshot(key=f"mine{n}", parent=f"two{n}"))
        assert rows(node) == {key: (True, inodes) for key, (_, inodes) in rows(node).items()}


async def test_the_next_copy_settles_what_a_killed_one_left(node: TestNode, client: Client, tmp_path: Path) -> None:
    node.start("snapshot")
    await unpack(client, tmp_path, Layer([file("one")]), "one")
    await all_settled(node)
    hold_settling(node)
    assert rows(node) == {"one": (False, 0)}
    node.of("snapshot").start()
    await all_settled(node)
    assert rows(node) == {"one": (True, 2)}


async def test_after_a_power_cut_a_run_unpacks_what_is_gone(tmp_path: Path, natsd: NatsServer) -> None:
    layers = [images.busybox_layer(), Layer([file("a", b"one ")]), Layer([file("b", b"two")])]
    image = images.Image.build(layers, config={"Env": ["PATH=/bin"], "Cmd": ["cat", "/a", "/b"]})
    with running(tmp_path / "registry") as registry:
        reference = images.push(image, registry.host, "power")
        async with runtime_node(tmp_path, natsd, others=("content", "snapshot")) as node:
            await node.client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=60)
            await all_settled(node.node)
            there = rows(node.node)
            assert len(there) == 3
            hold_settling(node.node)
            cut_the_power(node.node)
            node.node.of("snapshot").start()
            assert await node.client.collect(api.SNAPSHOT_LIST, api.ListSnapshots()) == []
            output = tmp_path / "out"
            run = runtime_api.RunTask(id="again", image=reference, stdio=Stdio(stdout=f"file://{output}"))
            await node.client.operate(runtime_api.TASK_RUN, run, timeout=60)
            assert (await node.wait("again")).exit_status == 0
            assert output.read_text() == "one two"
            assert there.items() <= rows(node.node).items()
            await node.remove_all()


async def test_what_cannot_be_written_goes(node: TestNode, client: Client, tmp_path: Path) -> None:
    """A disk that takes less than it says: the kernel finds that when it writes what it has taken."""
    place, small = node.root / "snapshot" / "overlayfs", tmp_path / "small"
    for directory in (place, small):
        directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "small", str(small)], check=True)
    try:
        with (small / "disk").open("wb") as disk:
            disk.truncate(96 * MIB)
        mkfs = ["mkfs.ext4", "-q", "-O", "^has_journal", "-N", "256", "-E", "nodiscard", str(small / "disk")]
        subprocess.run(mkfs, check=True)
        subprocess.run(["mount", "-o", "loop", str(small / "disk"), str(place)], check=True)
        try:
            node.start("snapshot")
            await unpack(client, tmp_path, Layer([file("fits", b"x")]), "fits")
            await all_settled(node)
            await unpack(client, tmp_path, Layer([file("large", os.urandom(40 * MIB))], "none"), "large", "fits")
            with pytest.raises(NotFound, match="parent snapshot large"):
                await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key="mine", parent="large"))
            assert rows(node) == {"fits": (True, 2)}
            assert "settling.lost" in node.of("snapshot").log.read_text()
            node.of("snapshot").stop()
        finally:
            subprocess.run(["umount", str(place)], check=True)
    finally:
        subprocess.run(["umount", str(small)], check=True)
