"""Layers that are unpacked before those below them are there, and while they still come: the same as one by one."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import tarfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import zstandard
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.database import Database
from shoal_bus.errors import Aborted, Cancelled, FailedPrecondition, ShoalError
from shoal_bus.types import Descriptor
from shoal_snapshot.apply.pool import Pool
from shoal_snapshot.layers import Layers
from shoal_snapshot.overlayfs import Overlayfs
from shoal_snapshot.records import MIGRATIONS
from shoal_snapshot.snapshots import Snapshots

from tests.integration.test_snapshot_umoci import BASE, CHANGES, TIME, save, umoci
from tests.support import images
from tests.support.images import Layer, directory, entry, file, hardlink, opaque, symlink, whiteout
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import context, listing, mounted

LINKED: dict[str, Sequence[images.Entry]] = {
    "through a link below": [file("bin/new", b"is in usr/bin", **TIME), whiteout("bin/su")],
    "a link of a link below": [
        entry("usr/bin/su3", tarfile.LNKTYPE, 0o4755, linkname="bin/su", **TIME),
    ],
    "implied and told": [file("var/cache/deep/c", b"c", **TIME), directory("var/cache/deep", 0o711, uid=4, **TIME)],
    "implied and hidden": [opaque("var"), file("var/cache/x", b"x", **TIME)],
    "hidden and implied": [file("var/cache/x", b"x", **TIME), opaque("var")],
    "implied and replaced": [file("opt/app/x", b"x", **TIME), file("opt", b"a file", **TIME)],
    "a file below becomes a directory": [file("etc/passwd/x", b"x", **TIME)],
    "nothing": [],
}

BEYOND_UMOCI = {"a file below becomes a directory", "a link of a link below"}
"""It refuses the one; of the other it has three hard links, where copying up in overlayfs parts two from the third."""


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


class Coming:
    """A blob as the content service leaves it while it is fetched: a file that grows, and has its place in the end."""

    def __init__(self, node: TestNode, image: images.Image, number: int) -> None:
        self.digest = image.layers[number]
        self.media_type, self.data = image.blobs[self.digest]
        self._content = node.root / "content"
        self.path = self._content / "following" / secrets.token_hex(8)
        self.path.parent.mkdir(exist_ok=True)
        self.path.touch()

    def write(self, data: bytes) -> None:
        with self.path.open("ab") as appended:
            appended.write(data)

    def start_over(self) -> None:
        beside = self.path.with_suffix(".new")
        beside.touch()
        beside.rename(self.path)

    def placed(self) -> None:
        place = self._content / "blobs" / "sha256" / self.digest.removeprefix("sha256:")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        os.link(self.path, place)

    def whole(self) -> Coming:
        self.write(self.data)
        self.placed()
        return self

    def request(self, name: str, parent: str, diff_id: str) -> api.UnpackLayer:
        descriptor = Descriptor(media_type=self.media_type, digest=self.digest, size=len(self.data))
        return api.UnpackLayer(
            name=name, parent=parent, descriptor=descriptor, path=str(self.path), diff_id=diff_id, early=True
        )


async def extracting(client: Client) -> set[str]:
    """The names of what is being extracted right now."""
    found = await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots())
    return {one.key.partition(" ")[2] for one in found if one.kind == "active" and one.key.startswith("extract-")}


async def unpack(node: TestNode, client: Client, image: images.Image, order: Sequence[int], name: str) -> str:
    """Unpacks an image whose layers arrive in an order, each when the one before it is being extracted."""
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number in order:
            coming = Coming(node, image, number).whole()
            parent = f"{name}-{number - 1}" if number else ""
            request = coming.request(f"{name}-{number}", parent, image.diff_ids[number])
            task = group.create_task(client.operate(api.SNAPSHOT_UNPACK, request))
            until = time.monotonic() + 0.5  # one that needs its parent is given up at once
            while not task.done() and time.monotonic() < until and request.name not in await extracting(client):
                await asyncio.sleep(0.005)
    return f"{name}-{len(image.layers) - 1}"


@asynccontextmanager
async def looked_at(client: Client, key: str, tmp_path: Path) -> AsyncIterator[Path]:
    view = api.PrepareSnapshot(key=f"look-{key}", parent=key)
    mounts = (await client.call(api.SNAPSHOT_VIEW, view)).mounts
    with mounted(mounts, tmp_path) as root:
        yield root
    await client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key=view.key))


async def tree(client: Client, key: str, tmp_path: Path) -> dict[str, Any]:
    """All of it, with the times of directories, but for those that nobody has told."""
    async with looked_at(client, key, tmp_path) as root:
        found: dict[str, Any] = listing(root)
        for path in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
            status = path.stat()
            told = status.st_mtime_ns if status.st_mtime < time.time() - 86_400 else None
            found[f"{path.relative_to(root)}/"] = (status.st_mode, status.st_uid, status.st_gid, told)
        return found


def image_of(*layers: Sequence[images.Entry]) -> images.Image:
    return images.Image.build([Layer(entries) for entries in layers])


@pytest.mark.timeout(180)
async def test_a_layer_before_its_parent_is_what_umoci_makes_of_it(
    node: TestNode, client: Client, tmp_path: Path
) -> None:
    for number, (case, change) in enumerate({**CHANGES, **LINKED}.items()):
        image = image_of(BASE, change)
        one_by_one = await tree(client, await unpack(node, client, image, (0, 1), f"s{number}"), tmp_path)
        early = await tree(client, await unpack(node, client, image, (1, 0), f"e{number}"), tmp_path)
        assert early.keys() == one_by_one.keys(), case
        assert [(path, early[path], what) for path, what in one_by_one.items() if early[path] != what] == [], case
        save(image, tmp_path / f"layout-{number}")
        if case in BEYOND_UMOCI:
            continue
        expected = listing(umoci(tmp_path / f"layout-{number}", tmp_path / f"bundle-{number}"))
        assert {path: early.get(path) for path in expected} == expected, case
    assert "unpack.on_its_parent" in node.of("snapshot").log.read_text()  # those that can't be had otherwise


@pytest.mark.timeout(240)
async def test_every_order_of_arrival_comes_to_the_same(node: TestNode, client: Client, tmp_path: Path) -> None:
    image = image_of(
        BASE,
        [*CHANGES["whiteouts"], symlink("lib", "usr/lib", **TIME), directory("usr/lib", 0o711, gid=3, **TIME)],
        [*LINKED["implied and told"], *CHANGES["opaque"], file("lib/one", b"through a link", **TIME)],
        [file("opt/app/four", b"4", **TIME), hardlink("usr/lib/two", "usr/lib/one", **TIME), whiteout("etc/shadow")],
    )
    expected: dict[str, Any] | None = None
    for order in itertools.permutations(range(4)):
        name = "".join(map(str, order))
        found = await tree(client, await unpack(node, client, image, order, name), tmp_path)
        expected = expected or found
        assert found == expected, order
    kinds = {one.kind for one in await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots())}
    assert kinds == {"committed"}


async def test_the_attributes_of_the_root_are_those_of_the_layer_below(
    node: TestNode, client: Client, tmp_path: Path
) -> None:
    image = image_of([file("a", b"a", **TIME)])
    request = Coming(node, image, 0).whole().request("top", "base", image.diff_ids[0])
    unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request))
    async with asyncio.timeout(20):
        while "top" not in await extracting(client):
            await asyncio.sleep(0.005)
    mounts = (await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key="b"))).mounts
    os.chown(mounts[0].source, 5, 6)
    Path(mounts[0].source).chmod(0o2751)
    await client.call(api.SNAPSHOT_COMMIT, api.CommitSnapshot(key="b", name="base"))
    assert (await unpacking).parent == "base"
    assert (await tree(client, "top", tmp_path))["./"][:3] == (0o42751, 5, 6)


async def test_a_layer_is_unpacked_while_it_comes(node: TestNode, client: Client, tmp_path: Path) -> None:
    entries = [file(f"f{number}", os.urandom(20_000)) for number in range(100)]
    image = images.Image.build([Layer(entries, "zstd")])
    coming = Coming(node, image, 0)
    unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, coming.request("one", "", image.diff_ids[0])))
    half = len(coming.data) // 2
    for at in range(0, half, 50_000):
        coming.write(coming.data[at : min(half, at + 50_000)])
        await asyncio.sleep(0.01)
    place = node.root / "snapshot" / "overlayfs" / "snapshots"
    async with asyncio.timeout(20):
        while len(list(place.glob("*/fs/f*"))) < 30:
            await asyncio.sleep(0.01)
    coming.write(coming.data[half:])
    async with asyncio.timeout(20):
        while len(list(place.glob("*/fs/f*"))) < 100:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert not unpacking.done()  # its digest isn't verified
    coming.placed()
    assert (await unpacking).kind == "committed"


async def test_a_blob_that_starts_over_is_unpacked_anew(node: TestNode, client: Client, tmp_path: Path) -> None:
    image = images.Image.build([Layer([file(f"f{number}", os.urandom(20_000)) for number in range(50)], "none")])
    wrong = Layer([file(f"wrong{number}", bytes(20_000)) for number in range(50)], "none").tar()
    broken = b"\x1f\x8b\x08" + os.urandom(100_000)
    for number, (first, pause) in enumerate(((wrong[:300_000], 0.3), (wrong, 0.3), (broken, 0.3), (b"", 0.0))):
        coming = Coming(node, image, 0)
        request = coming.request(f"l{number}", "", image.diff_ids[0])
        unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request))
        coming.write(first)
        await asyncio.sleep(pause)
        coming.start_over()
        coming.whole()
        async with asyncio.timeout(20):
            await unpacking
        async with looked_at(client, request.name, tmp_path) as root:
            assert sorted(path.name for path in root.iterdir()) == sorted(f"f{number}" for number in range(50))


async def test_a_blob_that_another_writer_has_placed_is_hashed_here(node: TestNode, client: Client) -> None:
    image = image_of([file("a", b"a" * 5_000)])
    faster, coming = Coming(node, image, 0).whole(), Coming(node, image, 0)
    coming.write(coming.data)
    request = coming.request("one", "", image.diff_ids[0])
    assert (await client.operate(api.SNAPSHOT_UNPACK, request)).kind == "committed"
    liar = Coming(node, image, 0)
    liar.write(coming.data[:-4] + b"\0\0\0\1")  # gzip's own length, which isn't right
    unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, liar.request("two", "", image.diff_ids[0])))
    await asyncio.sleep(0.5)
    assert not unpacking.done()  # its writer has to find out
    liar.path.unlink()
    with pytest.raises(Aborted):
        await unpacking
    await nothing_is_left(node, client, committed=1)
    assert faster.path.exists()


async def test_a_layer_that_cannot_be_is_told_when_its_bytes_are_certain(node: TestNode, client: Client) -> None:
    """Also where another writer has placed the blob long ago: wrong bytes might still be the fault of this one."""
    image = image_of([file("a"), file("a/b", os.urandom(100_000))])
    for number in range(2):
        coming = Coming(node, image, 0)
        unpacking = asyncio.create_task(
            client.operate(api.SNAPSHOT_UNPACK, coming.request(f"l{number}", "", image.diff_ids[0]))
        )
        coming.write(coming.data[:50_000])
        await asyncio.sleep(0.5)
        assert not unpacking.done()
        coming.write(coming.data[50_000:])
        if not number:
            coming.placed()
        with pytest.raises(FailedPrecondition, match="in the way"):
            await unpacking
    await nothing_is_left(node, client)


async def test_a_blob_that_is_given_up_leaves_nothing(node: TestNode, client: Client) -> None:
    image = image_of([file("a", os.urandom(50_000))])
    for pause in (0.0, 0.3, 1.0):
        coming = Coming(node, image, 0)
        request = coming.request("one", "", image.diff_ids[0])
        unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request))
        coming.write(coming.data[:20_000])
        await asyncio.sleep(pause)
        coming.path.unlink()
        with pytest.raises(ShoalError) as error:
            await unpacking
        assert error.value.code in (Aborted.code, ShoalError.code) or "not found" in str(error.value)
        await nothing_is_left(node, client)


async def nothing_is_left(node: TestNode, client: Client, committed: int = 0) -> None:
    assert len(await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots())) == committed
    place = node.root / "snapshot" / "overlayfs"
    async with asyncio.timeout(20):
        while len(list(place.glob("*/*"))) != committed:
            await asyncio.sleep(0.02)


async def test_a_wrong_diff_id_or_a_parent_that_never_comes_harms_nobody_else(node: TestNode, client: Client) -> None:
    """Two who want the same snapshot: the one who gives up takes nothing from the other."""
    image = image_of([file("a", b"1")], [file("b", b"2")])
    second = [Coming(node, image, 1).whole().request("two", "one", image.diff_ids[1]) for _ in range(2)]
    waiting = [asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request)) for request in second]
    bad = Coming(node, image, 0).whole().request("one", "", image.diff_ids[1])
    with pytest.raises(FailedPrecondition, match="diff ID"):
        await client.operate(api.SNAPSHOT_UNPACK, bad)
    waiting[0].cancel()
    with pytest.raises((asyncio.CancelledError, Cancelled)):
        await waiting[0]
    good = Coming(node, image, 0).whole().request("one", "", image.diff_ids[0])
    async with asyncio.timeout(20):
        await client.operate(api.SNAPSHOT_UNPACK, good)
        assert (await waiting[1]).parent == "one"
    await nothing_is_left(node, client, committed=2)


async def test_slow_blobs_keep_no_others_from_being_unpacked(node: TestNode, client: Client) -> None:
    image = image_of([file("a", os.urandom(50_000))])
    slow = [Coming(node, image, 0) for _ in range(8)]
    requests = [coming.request(f"slow{n}", "", image.diff_ids[0]) for n, coming in enumerate(slow)]
    waiting = [asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request)) for request in requests]
    for coming in slow:
        coming.write(coming.data[:1_000])
    while len(await extracting(client)) < len(slow):
        await asyncio.sleep(0.02)
    other = image_of([file("b", b"b")])
    async with asyncio.timeout(20):
        fast = Coming(node, other, 0).whole().request("fast", "", other.diff_ids[0])
        await client.operate(api.SNAPSHOT_UNPACK, fast)
        while "unpack.waits_for_all_of_it" not in node.of("snapshot").log.read_text():  # so many can't be followed
            await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    for coming in slow:
        coming.write(coming.data[1_000:])
        coming.placed()
    async with asyncio.timeout(30):
        await asyncio.gather(*waiting)
    await nothing_is_left(node, client, committed=len(slow) + 1)


async def test_layers_that_need_much_memory_are_unpacked_whole_and_one_at_a_time(
    node: TestNode, client: Client
) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=25)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    waiting, comings = [], []
    for number in range(4):
        image = image_of([file(f"f{number}", os.urandom(100_000))])
        tar = Layer([file(f"f{number}", os.urandom(5_000) * 20)]).tar()
        stream = compressor.compressobj()
        data = stream.compress(tar) + stream.flush()
        digest = images.digest_of(data)
        image.layers[0], image.blobs[digest] = digest, (f"{images.OCI}.layer.v1.tar+zstd", data)
        comings.append(Coming(node, image, 0))
        comings[-1].write(data[: len(data) // 2])
        request = comings[-1].request(f"l{number}", "", images.digest_of(tar))
        waiting.append(asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request)))
    async with asyncio.timeout(30):
        while node.of("snapshot").log.read_text().count("unpack.waits_for_all_of_it") < len(comings):
            await asyncio.sleep(0.05)
        for coming in comings:
            coming.write(coming.data[len(coming.data) // 2 :])
            coming.placed()
        await asyncio.gather(*waiting)
    await nothing_is_left(node, client, committed=len(comings))


@pytest.mark.timeout(120)
async def test_a_kill_in_the_middle_begins_early_layers_anew(node: TestNode, client: Client, tmp_path: Path) -> None:
    image = image_of(BASE, [file(f"var/f{n}", os.urandom(1_000)) for n in range(500)], CHANGES["whiteouts"])
    expected = await tree(client, await unpack(node, client, image, (0, 1, 2), "expected"), tmp_path)
    for number, delay in enumerate((0.02, 0.1, 0.2)):
        comings = [Coming(node, image, at) for at in range(3)]
        requests = [
            coming.request(f"k{number}-{at}", f"k{number}-{at - 1}" if at else "", image.diff_ids[at])
            for at, coming in enumerate(comings)
        ]
        waiting = [
            asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request, patience=30)) for request in requests
        ]
        comings[2].whole()
        comings[1].write(comings[1].data[:100_000])
        await asyncio.sleep(delay)
        node.of("snapshot").kill()
        comings[1].write(comings[1].data[100_000:])
        comings[1].placed()
        node.of("snapshot").start()
        comings[0].whole()
        async with asyncio.timeout(30):
            await asyncio.gather(*waiting)
        assert await tree(client, f"k{number}-2", tmp_path) == expected
    await nothing_is_left(node, client, committed=12)


class OneByOne(Overlayfs):
    """A snapshotter whose layers need those below them."""

    parallel = False


async def test_where_layers_need_those_below_they_wait_for_them(tmp_path: Path) -> None:
    node = TestNode(tmp_path, cast(Any, None))
    content, place = node.root / "content", tmp_path / "snapshots"
    image = image_of(BASE, CHANGES["implied"], CHANGES["whiteouts"])
    database = Database(tmp_path / "metadata.db", "test", MIGRATIONS, service="snapshot")
    content.mkdir(parents=True)
    snapshots, pool = Snapshots(database, OneByOne(place)), Pool()
    layers = Layers(snapshots, pool, content, tmp_path)
    comings = [Coming(node, image, number) for number in range(3)]
    try:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for number in (2, 1, 0):
                request = comings[number].request(
                    f"l{number}", f"l{number - 1}" if number else "", image.diff_ids[number]
                )
                group.create_task(layers.unpack(context(), request))
                comings[number].write(comings[number].data[:100])
                await asyncio.sleep(0.2)
                assert len(snapshots.records.all()) == (not number)
            for coming in comings:
                coming.write(coming.data[100:])
                coming.placed()
        assert {one.key: one.parent for one in snapshots.records.all()} == {"l0": "", "l1": "l0", "l2": "l1"}
        mounts = (await snapshots.view(context(), api.PrepareSnapshot(key="look", parent="l2"))).mounts
        with mounted(mounts, tmp_path) as root:
            assert (root / "var/cache/new").stat().st_size
            assert not (root / "etc/passwd").exists()
    finally:
        await pool.close()
        await snapshots.settled()
        database.close()
