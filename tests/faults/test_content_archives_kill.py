"""The content service, or its worker, is killed while archives come and go and images are converted; disks are full.

What comes from a file is begun again by the next copy; what comes by a FIFO is told to have broken off. Either way
nothing half done stays.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import Aborted, Internal, ResourceExhausted, ShoalError

from tests.support.archives import given, layout, taken, tar
from tests.support.images import Image, Layer, file
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

SEED, NAME, MADE = 20261125, "registry.example/app:v1", "registry.example/app:made"
ROUNDS = 6


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content", "snapshot")
        yield started


@pytest.fixture
def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def image(size: int = 3 << 20) -> Image:
    generator = random.Random(SEED)
    return Image.build([Layer([file(f"data{n}", generator.randbytes(size // 2) * 2)], "gzip") for n in range(4)])


Stored = tuple[set[str], set[str], set[str], set[str]]


async def state(client: Client, node: TestNode) -> Stored:
    """Files of the content service, and which blobs, snapshots and images are listed."""
    root = node.root / "content"
    parts = ("blobs", "ingests", "staging")
    files = {str(path.relative_to(root)) for part in parts for path in (root / part).rglob("*") if path.is_file()}
    blobs = {blob.digest for blob in await client.collect(content.BLOB_LIST, content.ListBlobs())}
    snapshots = {one.key for one in await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())}
    images = {one.name for one in await client.collect(content.IMAGE_LIST, content.ListImages())}
    return files, blobs, snapshots, images


async def settles(client: Client, node: TestNode, expected: Stored) -> None:
    for _ in range(200):
        if await state(client, node) == expected:
            return
        await asyncio.sleep(0.1)
    assert await state(client, node) == expected


EMPTY: Stored = set(), set(), set(), set()


async def killed_at_moments(
    node: TestNode, work: Callable[[], Awaitable[None]], check: Callable[[], Awaitable[None]]
) -> None:
    """Does `work` once for its length, then again with a kill of the service at each part of that."""
    clock = asyncio.get_running_loop().time
    began = clock()
    await work()
    length = clock() - began
    await check()
    generator = random.Random(SEED)
    for number in range(ROUNDS):
        working = asyncio.ensure_future(work())
        await asyncio.sleep(length * (number + generator.random()) / ROUNDS)
        node.of("content").kill()
        await asyncio.to_thread(node.of("content").start)
        await working
        await check()


@pytest.mark.timeout(240)
async def test_import_from_a_file_is_finished_by_the_next_copy(node: TestNode, client: Client, tmp_path: Path) -> None:
    one = image()
    path = tmp_path / "archive.tar"
    path.write_bytes(tar(layout({NAME: one})))
    whole: list[Stored] = []

    async def work() -> None:
        with given(node, path) as archive:
            request = content.ImportImages(archive=archive)
            await client.operate(content.IMAGE_IMPORT, request, timeout=60, patience=20)

    async def check() -> None:
        whole.append(await state(client, node))
        await settles(client, node, whole[0])
        await client.call(content.IMAGE_DELETE, content.ImageRequest(name=NAME))
        await settles(client, node, EMPTY)

    await killed_at_moments(node, work, check)
    assert whole[0][1] == {one.digest, *one.blobs}
    assert len(whole[0][2]) == 4


@pytest.mark.timeout(240)
async def test_export_to_a_file_is_finished_by_the_next_copy(node: TestNode, client: Client, tmp_path: Path) -> None:
    with given(node, tar(layout({NAME: image()}))) as archive:
        await client.operate(content.IMAGE_IMPORT, content.ImportImages(archive=archive, snapshotter=""))
    whole, before = list[bytes](), await state(client, node)
    out = tmp_path / "out.tar"

    async def work() -> None:
        with taken(node, out) as archive:
            request = content.ExportImages(archive=archive, names=[NAME])
            await client.operate(content.IMAGE_EXPORT, request, timeout=60, patience=20)

    async def check() -> None:
        whole.append(out.read_bytes())
        assert whole[-1] == whole[0]
        await settles(client, node, before)

    await killed_at_moments(node, work, check)
    # Nothing is held any more: the image goes with all it had.
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=NAME))
    await settles(client, node, EMPTY)


@pytest.mark.timeout(240)
async def test_conversion_is_finished_by_the_next_copy(node: TestNode, client: Client) -> None:
    with given(node, tar(layout({NAME: image()}))) as archive:
        await client.operate(content.IMAGE_IMPORT, content.ImportImages(archive=archive))
    before, targets = await state(client, node), set[str]()

    async def work() -> None:
        request = content.ConvertImage(source=NAME, name=MADE, compression="zstd")
        made = await client.operate(content.IMAGE_CONVERT, request, timeout=60, patience=20)
        targets.add(made.target.digest)

    async def check() -> None:
        check = await client.call(content.IMAGE_CHECK, content.CheckImage(name=MADE))
        assert check.complete
        assert check.platforms[0].unpacked == ["overlayfs"]
        await client.call(content.IMAGE_DELETE, content.ImageRequest(name=MADE))
        await settles(client, node, before)

    await killed_at_moments(node, work, check)
    assert len(targets) == 1


async def test_import_from_a_fifo_that_broke_off_is_told_and_leaves_nothing(node: TestNode, client: Client) -> None:
    place = node.state / content.ARCHIVES / "stream"
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place)
    request = content.ImportImages(archive="stream")
    loading = asyncio.create_task(client.operate(content.IMAGE_IMPORT, request, timeout=60, patience=20))
    fd = await asyncio.to_thread(os.open, place, os.O_WRONLY)
    os.write(fd, tar(layout({NAME: image()}))[:60_000])
    await asyncio.sleep(0.2)
    node.of("content").kill()
    await asyncio.to_thread(node.of("content").start)
    with pytest.raises(Aborted, match="broke off"):
        await loading
    os.close(fd)
    place.unlink()
    await settles(client, node, EMPTY)


async def test_worker_that_is_killed_is_told_and_leaves_nothing(node: TestNode, client: Client) -> None:
    place = node.state / content.ARCHIVES / "stream"
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place)
    loading = asyncio.create_task(client.operate(content.IMAGE_IMPORT, content.ImportImages(archive="stream")))
    fd = await asyncio.to_thread(os.open, place, os.O_WRONLY)
    (worker,) = psutil.Process(node.of("content").pid).children()
    worker.send_signal(signal.SIGKILL)
    with pytest.raises(Internal, match="killed by signal 9"):
        await loading
    os.close(fd)
    place.unlink()
    await settles(client, node, EMPTY)


async def test_service_that_is_killed_takes_its_worker_with_it(node: TestNode, client: Client) -> None:
    place = node.state / content.ARCHIVES / "stream"
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place)
    loading = asyncio.create_task(
        client.operate(content.IMAGE_IMPORT, content.ImportImages(archive="stream"), patience=20)
    )
    fd = await asyncio.to_thread(os.open, place, os.O_WRONLY)
    (worker,) = psutil.Process(node.of("content").pid).children()
    node.of("content").kill()
    await asyncio.to_thread(psutil.wait_procs, [worker], 10)
    assert not worker.is_running()
    await asyncio.to_thread(node.of("content").start)
    with pytest.raises(Aborted):
        await loading
    os.close(fd)
    place.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=700", "shoal-test", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


async def test_full_disk_while_importing_and_converting_is_told_and_given_back(
    natsd: NatsServer, connection: Connection, small_disk: Path, tmp_path: Path
) -> None:
    generator = random.Random(SEED)
    large = Image.build([Layer([file("large", generator.randbytes(16 << 20))], "none")])
    fits = Image.build([Layer([file("fits", generator.randbytes(6 << 20))], "none")])
    with TestNode(tmp_path, natsd) as node:
        node.root = small_disk
        node.start("content")
        client = Client(connection, node.name)

        async def load(one: Image, *, fifo: bool) -> None:
            with given(node, tar(layout({NAME: one})), fifo=fifo) as archive:
                request = content.ImportImages(archive=archive, snapshotter="")
                await client.operate(content.IMAGE_IMPORT, request, timeout=60)

        for fifo in (False, True):
            with pytest.raises(ResourceExhausted, match="no space left"):
                await load(large, fifo=fifo)
            files, *listed = await state_of_content(client, node)
            assert (files, *listed) == (set(), set(), set())
        await load(fits, fifo=True)
        before = await state_of_content(client, node)
        request = content.ConvertImage(source=NAME, name=MADE, compression="gzip", snapshotter="")
        with pytest.raises(ResourceExhausted, match="no space left"):
            await client.operate(content.IMAGE_CONVERT, request, timeout=60)
        assert await state_of_content(client, node) == before


async def state_of_content(client: Client, node: TestNode) -> tuple[set[str], set[str], set[str]]:
    root = node.root / "content"
    parts = ("blobs", "ingests", "staging")
    files = {path.name for part in parts for path in (root / part).rglob("*") if path.is_file()}
    blobs = {blob.digest for blob in await client.collect(content.BLOB_LIST, content.ListBlobs())}
    images = {one.name for one in await client.collect(content.IMAGE_LIST, content.ListImages())}
    return files, blobs, images


async def test_full_disk_while_exporting_is_told(node: TestNode, client: Client, small_disk: Path) -> None:
    large = Image.build([Layer([file("large", random.Random(SEED).randbytes(16 << 20))], "none")])
    with given(node, tar(layout({NAME: large}))) as archive:
        await client.operate(content.IMAGE_IMPORT, content.ImportImages(archive=archive, snapshotter=""))
    before = await state(client, node)
    with taken(node, small_disk / "out.tar") as archive, pytest.raises(ResourceExhausted, match="no space left"):
        await client.operate(content.IMAGE_EXPORT, content.ExportImages(archive=archive, names=[NAME]))
    assert await state(client, node) == before
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=NAME))
    await settles(client, node, EMPTY)


async def test_reader_that_goes_away_ends_an_export(node: TestNode, client: Client) -> None:
    with given(node, tar(layout({NAME: image(8 << 20)}))) as archive:
        await client.operate(content.IMAGE_IMPORT, content.ImportImages(archive=archive, snapshotter=""))
    place = node.state / content.ARCHIVES / "stream"
    os.mkfifo(place)

    def read_a_little() -> None:
        with place.open("rb") as file:
            file.read(1000)

    reading = threading.Thread(target=read_a_little)
    reading.start()
    with pytest.raises(ShoalError, match="its reader is gone"):
        await client.operate(content.IMAGE_EXPORT, content.ExportImages(archive="stream", names=[NAME]))
    reading.join(10)
    place.unlink()
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=NAME))
    await settles(client, node, EMPTY)
