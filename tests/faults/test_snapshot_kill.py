"""The snapshot service is killed at any moment of its work: what was asked is done once, or not at all."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.errors import AlreadyExists, NotFound

from tests.support.images import Layer, directory, file
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import listing, write_blob

DELAYS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.11, 0.15, 0.2)
LAYER = Layer([directory("d"), *(file(f"d/{n}", bytes([n % 251]) * 2_000) for n in range(1_500))])


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def place(node: TestNode) -> Path:
    return node.root / "snapshot" / "overlayfs"


async def whole(node: TestNode, client: Client, expected: dict[str, str]) -> None:
    """The snapshots are these (key to kind), each has its directory, and there is nothing else on disk."""
    found = {s.key: s.kind for s in await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots())}
    assert found == expected
    async with asyncio.timeout(20):
        while list((place(node) / "trash").iterdir()):
            await asyncio.sleep(0.02)
    assert len(list((place(node) / "snapshots").iterdir())) == len(expected)


async def lives(client: Client) -> dict[str, list[str]]:
    """What the events say of each snapshot, once nothing more comes."""
    before = -1
    while True:
        events = [r.event async for r in read_events(client.connection, start=1, follow=False)]
        if len(events) == before:
            break
        before = len(events)
        await asyncio.sleep(0.5)
    assert [k for k, n in Counter((e.topic, e.id, e.timestamp) for e in events).items() if n > 1] == []
    told: dict[str, list[str]] = {}
    for event in events:
        told.setdefault(event.id, []).append(event.topic.removeprefix("/snapshot/"))
    return told


@pytest.mark.timeout(180)
@pytest.mark.parametrize("copies", [1, 2])
async def test_an_unpack_survives_a_kill_at_any_moment(
    node: TestNode, client: Client, tmp_path: Path, copies: int
) -> None:
    if copies == 2:
        node.start("snapshot")
    path, blob, diff_id = write_blob(tmp_path, LAYER)
    expected: dict[str, str] = {}
    contents = None
    for number, delay in enumerate(DELAYS):
        request = api.UnpackLayer(name=f"l{number}", descriptor=blob, path=str(path), diff_id=diff_id)
        unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request, timeout=60, patience=20))
        await asyncio.sleep(delay)
        victim = node.of("snapshot", number % copies)
        victim.kill()
        victim.start()
        assert (await unpacking).kind == "committed"
        expected[f"l{number}"] = "committed"
        await whole(node, client, expected)
        newest = max(int(p.name) for p in (place(node) / "snapshots").iterdir())
        unpacked = listing(place(node) / "snapshots" / str(newest) / "fs")
        contents = contents or unpacked
        assert len(unpacked) == 1_502
        assert unpacked == contents, f"after a kill {delay} s into it"
    for key, told in (await lives(client)).items():
        assert told == ["prepare", "remove"] * (len(told) // 2 - 1) + ["prepare", "commit"], key


async def test_an_orderly_stop_in_the_middle_leaves_the_rest_to_the_next_copy(
    node: TestNode, client: Client, tmp_path: Path
) -> None:
    path, blob, diff_id = write_blob(tmp_path, LAYER)
    for number, delay in enumerate((0.01, 0.05, 0.1)):
        request = api.UnpackLayer(name=f"l{number}", descriptor=blob, path=str(path), diff_id=diff_id)
        unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request, timeout=60, patience=20))
        await asyncio.sleep(delay)
        workers = psutil.Process(node.of("snapshot").pid).children()
        for process in workers:
            process.terminate()  # systemd tells the whole group
        assert await asyncio.to_thread(node.of("snapshot").stop) == 0
        assert psutil.wait_procs(workers, timeout=10)[1] == []
        node.of("snapshot").start()
        assert (await unpacking).kind == "committed"
    await whole(node, client, {f"l{number}": "committed" for number in range(3)})


@pytest.mark.timeout(180)
async def test_a_workers_death_is_told_and_nothing_is_left(node: TestNode, client: Client, tmp_path: Path) -> None:
    big = Layer([file(f"{n}", b"x" * 100) for n in range(60_000)], "none")
    path, blob, diff_id = write_blob(tmp_path, big)
    request = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request, timeout=60))
    async with asyncio.timeout(10):
        while not list(place(node).glob("snapshots/*/fs/*")):
            await asyncio.sleep(0.01)
    for worker in psutil.Process(node.of("snapshot").pid).children():
        worker.kill()
    with pytest.raises(Exception, match="killed by signal 9"):
        await unpacking
    await whole(node, client, {})
    assert (await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)).key == "one"


async def test_workers_die_with_their_service(node: TestNode, client: Client, tmp_path: Path) -> None:
    path, blob, diff_id = write_blob(tmp_path, LAYER)
    request = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)
    workers = psutil.Process(node.of("snapshot").pid).children(recursive=True)
    assert workers
    node.of("snapshot").kill()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert (len(gone), alive) == (len(workers), [])


@pytest.mark.timeout(180)
async def test_an_apply_survives_a_kill_at_any_moment(node: TestNode, client: Client, tmp_path: Path) -> None:
    path, blob, diff_id = write_blob(tmp_path, LAYER)
    for number, delay in enumerate(DELAYS):
        key = f"k{number}"
        mounts = (await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key=key))).mounts
        request = api.ApplyLayer(descriptor=blob, path=str(path), mounts=mounts)
        applying = asyncio.create_task(client.operate(api.DIFF_APPLY, request, timeout=60, patience=20))
        await asyncio.sleep(delay)
        node.of("snapshot").kill()
        node.of("snapshot").start()
        applied = await applying
        assert (applied.descriptor.digest, applied.entries) == (diff_id, 1_501)
        assert len(listing(Path(mounts[0].source))) == 1_502
    await whole(node, client, {f"k{number}": "active" for number in range(len(DELAYS))})


@pytest.mark.timeout(180)
async def test_an_apply_onto_a_whole_tree_survives_a_kill_at_any_moment(
    node: TestNode, client: Client, tmp_path: Path
) -> None:
    """Whoever takes it up applies it once more, over what was written."""
    path, blob, diff_id = write_blob(tmp_path, LAYER)
    prepare, commit = api.SNAPSHOT_PREPARE.on("native"), api.SNAPSHOT_COMMIT.on("native")
    below = (await client.call(prepare, api.PrepareSnapshot(key="below"))).mounts
    (Path(below[0].source) / "of-the-parent").touch()
    await client.call(commit, api.CommitSnapshot(key="below", name="one"))
    for number, delay in enumerate(DELAYS):
        mounts = (await client.call(prepare, api.PrepareSnapshot(key=f"k{number}", parent="one"))).mounts
        request = api.ApplyLayer(descriptor=blob, path=str(path), mounts=mounts)
        applying = asyncio.create_task(client.operate(api.DIFF_APPLY, request, timeout=60, patience=20))
        await asyncio.sleep(delay)
        node.of("snapshot").kill()
        node.of("snapshot").start()
        assert (await applying).descriptor.digest == diff_id
        assert len(listing(Path(mounts[0].source))) == 1_503
        await client.call(commit, api.CommitSnapshot(key=f"k{number}", name=f"done-{number}"))


@pytest.mark.timeout(180)
async def test_lives_survive_kills_at_any_moment(node: TestNode, client: Client) -> None:
    """Many short lives at once, while one of two copies and then the other is killed and started again."""
    node.start("snapshot")
    await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key="base"))
    await client.call(api.SNAPSHOT_COMMIT, api.CommitSnapshot(key="base", name="one"))
    done = asyncio.Event()
    lived: list[str] = []

    async def live(worker: int) -> None:
        number = 0
        while not done.is_set():
            key = f"w{worker}-{number}"
            number += 1
            await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key=key, parent="one"), timeout=60)
            await client.call(api.SNAPSHOT_COMMIT, api.CommitSnapshot(key=key, name=f"{key}-done"), timeout=60)
            await client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key=f"{key}-done"), timeout=60)
            lived.append(key)

    async def kill() -> None:
        for number in range(12):
            await asyncio.sleep(0.15)
            victim = node.of("snapshot", number % 2)
            victim.kill()
            victim.start()
        done.set()

    try:
        await asyncio.gather(kill(), *(live(worker) for worker in range(6)))
    finally:
        done.set()
    assert len(lived) > 50
    # What a copy hadn't yet deleted when it was killed is deleted by the next start.
    node.of("snapshot").kill()
    node.of("snapshot").start()
    await whole(node, client, {"one": "committed"})
    told = await lives(client)
    for key in lived:
        assert told[key] == ["prepare", "commit"], key
        assert told[f"{key}-done"] == ["remove"], key


async def test_a_request_repeated_after_a_kill_gets_the_same_answer(node: TestNode, client: Client) -> None:
    prepare = api.PrepareSnapshot(key="a")
    first = await client.call(api.SNAPSHOT_PREPARE, prepare, id="the-same")
    node.of("snapshot").kill()
    node.of("snapshot").start()
    assert await client.call(api.SNAPSHOT_PREPARE, prepare, id="the-same") == first
    with pytest.raises(AlreadyExists):
        await client.call(api.SNAPSHOT_PREPARE, prepare, id="another")
    await client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key="a"), id="gone")
    node.of("snapshot").kill()
    node.of("snapshot").start()
    await client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key="a"), id="gone")
    with pytest.raises(NotFound):
        await client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key="a"), id="again")
    await whole(node, client, {})


async def test_what_a_dead_copy_left_is_in_nobodys_way(node: TestNode, client: Client, tmp_path: Path) -> None:
    """The client is gone, too: nobody asks after what was begun, and somebody else wants the same."""
    path, blob, diff_id = write_blob(tmp_path, Layer([file(f"{n}", b"x") for n in range(20_000)], "none"))
    request = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request, timeout=60, id="left"))
    async with asyncio.timeout(10):
        while not list((place(node) / "snapshots").iterdir()):
            await asyncio.sleep(0.01)
    node.of("snapshot").kill()
    unpacking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unpacking
    node.of("snapshot").start()
    assert (await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)).kind == "committed"
    # Asked again, the first one finds it there, and takes what it left away.
    assert (await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60, id="left")).kind == "committed"
    await whole(node, client, {"one": "committed"})
