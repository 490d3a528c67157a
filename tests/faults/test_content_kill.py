"""The content service is killed in the middle of pulls, and its disk fills up: nothing half done, every event once."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.errors import ResourceExhausted, ShoalError

from tests.support.content_proxy import Proxy, proxy
from tests.support.images import Image, Layer, file, push
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running

SEED = 20261124


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


@pytest.fixture
async def between(registry: Registry) -> AsyncIterator[Proxy]:
    async with proxy(registry.host) as made:
        yield made


@pytest.fixture
def image(registry: Registry) -> Image:
    generator = random.Random(SEED)
    layers = [Layer([file(f"data{n}", generator.randbytes(400_000))], "gzip") for n in range(4)]
    built = Image.build(layers)
    push(built, registry.host, "app")
    return built


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content", "snapshot")
        yield started


@pytest.fixture
def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def stored(node: TestNode) -> dict[str, list[str]]:
    root = node.root / "content"
    parts = ("blobs", "ingests", "following")
    return {part: sorted(p.name for p in (root / part).rglob("*") if p.is_file()) for part in parts}


async def state(client: Client, node: TestNode) -> tuple[dict[str, list[str]], set[str], set[str], set[str]]:
    """What is on disk, and which blobs, snapshots and images are listed."""
    blobs = {blob.digest for blob in await client.collect(content.BLOB_LIST, content.ListBlobs())}
    snapshots = {one.key for one in await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())}
    images = {one.name for one in await client.collect(content.IMAGE_LIST, content.ListImages())}
    return stored(node), blobs, snapshots, images


NOTHING: dict[str, list[str]] = {"blobs": [], "ingests": [], "following": []}
EMPTY = NOTHING, set[str](), set[str](), set[str]()


async def check_events(connection: Connection, whole: int) -> None:
    """Creates and deletes of each thing alternate, beginning with a create: none is lost, none doubled."""
    last: dict[tuple[str, str], str] = {}
    counts: Counter[str] = Counter()
    async with aclosing(read_events(connection, start=1, follow=False)) as events:  # type: ignore[type-var]
        async for received in events:
            event = received.event
            if event.service != "content":
                continue
            _, kind, verb = event.topic.split("/")
            key = kind, event.id
            assert verb != last.get(key, "delete"), f"{event.topic} of {event.id} comes twice"
            last[key] = verb
            counts[event.topic] += 1
    assert counts["/images/create"] == counts["/images/delete"] == whole
    assert counts["/content/create"] == counts["/content/delete"]


@pytest.mark.timeout(240)
async def test_pull_is_finished_by_the_next_copy_wherever_the_first_is_killed(
    node: TestNode, client: Client, between: Proxy, image: Image, connection: Connection
) -> None:
    between.pause = 0.004
    name = f"{between.host}/app:latest"
    request = content.PullImage(name=name, max_concurrent_downloads=2)
    began = asyncio.get_running_loop().time()
    await client.operate(content.IMAGE_PULL, request)
    length = asyncio.get_running_loop().time() - began
    whole = await state(client, node)
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert await state(client, node) == EMPTY
    generator, rounds = random.Random(SEED), 10
    for number in range(rounds):
        pulling = asyncio.create_task(client.operate(content.IMAGE_PULL, request, timeout=60, patience=20))
        await asyncio.sleep(length * (number + generator.random()) / rounds)
        node.of("content").kill()
        await asyncio.to_thread(node.of("content").start)
        pulled = await pulling
        assert pulled.target.digest == image.digest
        assert await state(client, node) == whole, f"after kill number {number}"
        await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
        assert await state(client, node) == EMPTY, f"after kill number {number}"
    await asyncio.sleep(0.5)
    await check_events(connection, rounds + 1)


@pytest.mark.timeout(300)
async def test_a_pull_comes_whole_whichever_of_the_two_services_is_killed(
    node: TestNode, client: Client, between: Proxy, image: Image
) -> None:
    """Layers are unpacked while they come: content dies under its reader, and the reader under content."""
    between.pause = 0.004
    name = f"{between.host}/app:latest"
    request = content.PullImage(name=name)
    began = asyncio.get_running_loop().time()
    await client.operate(content.IMAGE_PULL, request)
    length = asyncio.get_running_loop().time() - began
    whole = await state(client, node)
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    generator = random.Random(SEED + 1)
    for number in range(12):
        victims = (["snapshot"], ["content"], ["snapshot", "content"])[number % 3]
        pulling = asyncio.create_task(client.operate(content.IMAGE_PULL, request, timeout=60, patience=30))
        await asyncio.sleep(length * generator.random())
        for victim in victims:
            node.of(victim).kill()
        for victim in victims:
            await asyncio.to_thread(node.of(victim).start)
        assert (await pulling).target.digest == image.digest
        assert await state(client, node) == whole, f"after kill number {number} of {victims}"
        await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
        async with asyncio.timeout(30):
            while await state(client, node) != EMPTY:
                await asyncio.sleep(0.1)


async def test_killed_download_goes_on_where_it_was(
    node: TestNode, client: Client, between: Proxy, image: Image
) -> None:
    between.pause = 0.02
    pulling = asyncio.create_task(
        client.operate(content.IMAGE_PULL, content.PullImage(name=f"{between.host}/app", snapshotter=""), timeout=60)
    )
    while not stored(node)["ingests"] or not between.blob_requests(image.layers[0]):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    node.of("content").kill()
    between.pause = 0.0
    await asyncio.to_thread(node.of("content").start)
    await pulling
    again = [one.range for digest in image.layers for one in between.blob_requests(digest)[1:]]
    assert any(one.startswith("bytes=") and one != "bytes=0-" for one in again), again


async def test_another_copy_takes_a_pull_over(node: TestNode, client: Client, between: Proxy, image: Image) -> None:
    node.start("content")
    between.pause = 0.01
    request = content.PullImage(name=f"{between.host}/app")
    pulls = [
        asyncio.create_task(client.with_namespace(f"n{n}").operate(content.IMAGE_PULL, request, timeout=60))
        for n in range(4)
    ]
    await asyncio.sleep(0.4)
    node.of("content", 0).kill()
    assert {one.target.digest for one in await asyncio.gather(*pulls)} == {image.digest}
    assert stored(node)["ingests"] == []


async def test_stopped_copy_leaves_its_pull_to_the_next(
    node: TestNode, client: Client, between: Proxy, image: Image
) -> None:
    between.pause = 0.01
    request = content.PullImage(name=f"{between.host}/app")
    pulling = asyncio.create_task(client.operate(content.IMAGE_PULL, request, timeout=60, patience=20))
    await asyncio.sleep(0.4)
    assert await asyncio.to_thread(node.of("content").stop) == 0
    await asyncio.to_thread(node.of("content").start)
    assert (await pulling).target.digest == image.digest


async def test_image_deleted_by_a_copy_that_is_killed_is_gone_whole(
    node: TestNode, client: Client, registry: Registry, image: Image
) -> None:
    name = f"{registry.host}/app:latest"
    for delay in (0.0, 0.003, 0.006, 0.01, 0.02, 0.04):
        await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
        deleting = asyncio.create_task(client.call(content.IMAGE_DELETE, content.ImageRequest(name=name), patience=20))
        await asyncio.sleep(delay)
        node.of("content").kill()
        await asyncio.to_thread(node.of("content").start)
        await deleting
        for _ in range(100):
            if await state(client, node) == EMPTY:
                break
            await asyncio.sleep(0.25)
        assert await state(client, node) == EMPTY, f"after a kill {delay} s into a delete"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "shoal-test", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


async def test_full_disk_is_resource_exhausted_and_leaves_room_for_the_next(
    natsd: NatsServer, connection: Connection, registry: Registry, small_disk: Path, tmp_path: Path
) -> None:
    data = random.Random(SEED).randbytes(12 << 20)
    large = push(Image.build([Layer([file("large", data)], "none")]), registry.host, "large")
    fits = push(Image.build([Layer([file("fits", data[: 1 << 20])], "none")]), registry.host, "fits")
    with TestNode(tmp_path, natsd) as node:
        node.root = small_disk
        node.start("content")
        client = Client(connection, node.name)
        for _ in range(2):
            with pytest.raises(ResourceExhausted, match="no space left"):
                await client.operate(content.IMAGE_PULL, content.PullImage(name=large, snapshotter=""))
            assert stored(node) == NOTHING
        await client.operate(content.IMAGE_PULL, content.PullImage(name=fits, snapshotter=""))
        offset = 0

        async def fill() -> None:
            nonlocal offset
            while True:
                request = content.WriteIngest(ref="r", offset=offset, data=data[: 512 * 1024])
                offset = (await client.call(content.INGEST_WRITE, request)).offset

        with pytest.raises(ResourceExhausted):
            await fill()
        assert (await client.call(content.INGEST_STATUS, content.IngestRequest(ref="r"))).offset == offset
        await client.call(content.INGEST_ABORT, content.IngestRequest(ref="r"))


async def test_pull_without_the_snapshot_service_fails_clean(
    node: TestNode, client: Client, registry: Registry, image: Image
) -> None:
    request = content.PullImage(name=f"{registry.host}/app", snapshotter="no-such")
    pulling = asyncio.create_task(client.operate(content.IMAGE_PULL, request))
    await asyncio.sleep(1)
    pulling.cancel()
    with pytest.raises((asyncio.CancelledError, ShoalError)):
        await pulling
    for _ in range(100):
        if await state(client, node) == EMPTY:
            return
        await asyncio.sleep(0.1)
    assert await state(client, node) == EMPTY
