"""Pulls whose layers are unpacked while they come: by content and snapshot together, from a real registry."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from shoal_bus import image_reference as reference
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.database import Database
from shoal_bus.errors import FailedPrecondition, InvalidArgument, NotFound, ShoalError, Unavailable
from shoal_bus.locks import Locks
from shoal_bus.types import Descriptor
from shoal_content.blobs.ingests import Ingests
from shoal_content.blobs.layout import Layout
from shoal_content.blobs.store import Store
from shoal_content.images.tree import Trees
from shoal_content.registry.http import HttpResolver
from shoal_content.schema import MIGRATIONS
from shoal_content.transfer import fetch
from shoal_content.transfer.holds import Holds

from tests.support.content_proxy import Proxy, proxy
from tests.support.images import Image, Layer, digest_of, directory, file, push, whiteout
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


@pytest.fixture
async def between(registry: Registry) -> AsyncIterator[Proxy]:
    async with proxy(registry.host) as made:
        yield made


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content", "snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


@pytest.fixture
def image(registry: Registry) -> Image:
    """Four layers, some 300 kB each."""
    layers = [
        Layer([directory(f"d{n}"), *(file(f"d{n}/f{m}", os.urandom(6_000)) for m in range(50))], "gzip")
        for n in range(3)
    ]
    built = Image.build([*layers, Layer([whiteout("d0/f0"), file("d1/new", os.urandom(300_000))], "zstd")])
    push(built, registry.host, "app")
    return built


def left(node: TestNode) -> list[str]:
    """What there is of blobs, ingests and snapshots on disk."""
    parts = [node.root / "content" / part for part in ("blobs", "ingests", "following")]
    files = [str(path) for part in parts for path in part.rglob("*") if path.is_file()]
    return files + [str(path) for path in (node.root / "snapshot" / "overlayfs").glob("*/*")]


async def nothing_is_left(node: TestNode, client: Client) -> None:
    async with asyncio.timeout(20):
        while left(node) or await snapshots(client):
            await asyncio.sleep(0.05)


async def snapshots(client: Client) -> dict[str, str]:
    return {one.key: one.kind for one in await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())}


async def committed(client: Client, count: int) -> None:
    """What others had under way, and was cancelled, is gone soon."""
    async with asyncio.timeout(20):
        while list((await snapshots(client)).values()) != ["committed"] * count:
            await asyncio.sleep(0.05)


def without_order(image: Image) -> Image:
    """The same image, but the diff IDs of its upper two layers have been exchanged."""
    config = json.loads(image.blobs[json.loads(image.manifest)["config"]["digest"]][1])
    diff_ids = config["rootfs"]["diff_ids"]
    diff_ids[2], diff_ids[3] = diff_ids[3], diff_ids[2]
    data = json.dumps(config).encode()
    manifest = json.loads(image.manifest)
    blobs = {digest: blob for digest, blob in image.blobs.items() if digest in image.layers}
    blobs[digest_of(data)] = manifest["config"]["mediaType"], data
    manifest["config"] |= {"digest": digest_of(data), "size": len(data)}
    return Image(image.media_type, json.dumps(manifest).encode(), blobs, layers=image.layers, diff_ids=diff_ids)


async def test_a_snapshotter_that_nobody_answers_for_is_told_before_anything_is_fetched(
    node: TestNode, client: Client, between: Proxy, image: Image
) -> None:
    began = asyncio.get_running_loop().time()
    request = content.PullImage(name=f"{between.host}/app", snapshotter="nonesuch")
    with pytest.raises(NotFound, match="snapshotter nonesuch") as error:
        await client.operate(content.IMAGE_PULL, request)
    assert "overlayfs" in error.value.hint
    assert asyncio.get_running_loop().time() - began < 5
    assert between.seen == []
    assert left(node) == []
    with pytest.raises(InvalidArgument):
        await client.operate(content.IMAGE_PULL, request.model_copy(update={"snapshotter": "no/such.*"}))
    await client.operate(content.IMAGE_PULL, request.model_copy(update={"snapshotter": "native"}), timeout=60)
    unpack = content.UnpackImage(name=f"{between.host}/app:latest", snapshotter="nonesuch")
    with pytest.raises(NotFound, match="snapshotter nonesuch"):
        await client.operate(content.IMAGE_UNPACK, unpack)


async def test_layers_are_unpacked_while_they_come(
    node: TestNode, client: Client, between: Proxy, image: Image
) -> None:
    between.pause = 0.05
    request = content.PullImage(name=f"{between.host}/app", max_concurrent_downloads=2)
    told: list[content.PullProgress] = []
    pulling = asyncio.create_task(client.operate(content.IMAGE_PULL, request, on_progress=told.append, timeout=60))
    place = node.root / "snapshot" / "overlayfs" / "snapshots"
    async with asyncio.timeout(30):
        while not (list(place.glob("*/fs/d0/f*")) and list(place.glob("*/fs/d1/f*"))):
            await asyncio.sleep(0.01)
    assert not any(
        path.is_file() and path.stat().st_size > 100_000 for path in (node.root / "content/blobs").rglob("*")
    )
    assert set((await snapshots(client)).values()) == {"active"}
    between.pause = 0.0
    await pulling
    assert set((await snapshots(client)).values()) == {"committed"}
    assert len(await snapshots(client)) == 4
    assert not list((node.root / "content" / "following").iterdir())
    assert {layer.state for layer in told[-1].layers} <= {"extracting", "downloaded", "done"}
    assert [progress.bytes_done for progress in told] == sorted(progress.bytes_done for progress in told)


async def test_a_layer_that_is_wrong_leaves_nothing_and_takes_nothing_from_another_pull(
    node: TestNode, client: Client, between: Proxy, image: Image, registry: Registry
) -> None:
    wrong = push(without_order(image), registry.host, "wrong")
    with pytest.raises(FailedPrecondition, match="diff ID"):
        await client.operate(content.IMAGE_PULL, content.PullImage(name=wrong), timeout=60)
    await nothing_is_left(node, client)
    between.pause = 0.01
    good = asyncio.create_task(
        client.operate(content.IMAGE_PULL, content.PullImage(name=f"{between.host}/app"), timeout=60)
    )
    bad = content.PullImage(name=f"{between.host}/wrong")
    for _ in range(3):
        with pytest.raises(FailedPrecondition, match="diff ID"):
            await client.operate(content.IMAGE_PULL, bad, timeout=60)
    assert (await good).target.digest == image.digest
    await committed(client, 4)
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=f"{between.host}/app:latest"))
    await nothing_is_left(node, client)


async def test_a_pull_that_is_cancelled_takes_nothing_from_another_one_of_the_same_image(
    node: TestNode, client: Client, between: Proxy, image: Image
) -> None:
    between.pause = 0.05
    names = [f"{between.host}/app:latest", f"{between.host}/app@{image.digest}"]
    first, second = (
        asyncio.create_task(client.operate(content.IMAGE_PULL, content.PullImage(name=name), timeout=60))
        for name in names
    )
    await asyncio.sleep(0.5)
    assert not first.done()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    between.pause = 0.0
    assert (await second).target.digest == image.digest
    await committed(client, 4)
    for name in names[1:]:
        await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    await nothing_is_left(node, client)


async def test_concurrent_pulls_unpack_each_layer_once(
    node: TestNode, client: Client, between: Proxy, image: Image, connection: Connection
) -> None:
    node.start("content", "snapshot")  # a layer's parent may be committed by the other copy
    between.pause = 0.002
    for tag in "abc":
        push(image, between.upstream, "app", tag)
    requests = [content.PullImage(name=f"{between.host}/app:{tag}") for tag in "abc"]
    await asyncio.gather(*(client.operate(content.IMAGE_PULL, request, timeout=60) for request in requests))
    assert {digest: len(between.blob_requests(digest)) for digest in image.blobs} == dict.fromkeys(image.blobs, 1)
    async with asyncio.timeout(20):
        while True:
            events = [received.event async for received in read_events(connection, start=1, follow=False)]
            told = Counter(event.topic for event in events if event.topic.startswith("/snapshot/"))
            if told["/snapshot/commit"] >= 4:
                break
            await asyncio.sleep(0.1)
    assert told == {"/snapshot/prepare": 4, "/snapshot/commit": 4}


async def test_pulled_again_nothing_is_fetched_or_unpacked(
    node: TestNode, client: Client, between: Proxy, image: Image
) -> None:
    request = content.PullImage(name=f"{between.host}/app")
    await client.operate(content.IMAGE_PULL, request, timeout=60)
    before = await snapshots(client)
    between.seen.clear()
    await client.operate(content.IMAGE_PULL, request, timeout=60)
    assert await snapshots(client) == before
    assert not [one for one in between.seen if "/blobs/" in one.path]
    # What is here already is unpacked from where it is.
    for key in await _top_first(client):
        await client.call(snapshot.SNAPSHOT_REMOVE, snapshot.SnapshotRequest(key=key))
    await client.operate(content.IMAGE_PULL, request, timeout=60)
    assert await snapshots(client) == before
    assert not [one for one in between.seen if "/blobs/" in one.path]


async def _top_first(client: Client) -> list[str]:
    parents = {one.key: one.parent for one in await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())}
    key = (parents.keys() - set(parents.values())).pop()
    found = []
    while key:
        found.append(key)
        key = parents[key]
    return found


async def test_a_client_cannot_write_to_a_pulls_ingest(client: Client, image: Image) -> None:
    for ref in (f"pull-{image.layers[0]}", "pull-"):
        with pytest.raises(InvalidArgument, match="pull"):
            await client.call(content.INGEST_WRITE, content.WriteIngest(ref=ref, data=b"x"))
    assert await client.collect(content.INGEST_LIST, content.ListBlobs()) == []


async def test_paths_outside_the_contents_own_are_not_found(node: TestNode, client: Client, image: Image) -> None:
    """The same answer whether there is something, and nothing of what it is."""
    mounts = (await client.call(snapshot.SNAPSHOT_PREPARE, snapshot.PrepareSnapshot(key="k"))).mounts
    root = node.root / "content"
    (root / "link").symlink_to("/etc")
    digest = image.layers[0]
    blob = Descriptor(media_type=image.blobs[digest][0], digest=digest, size=0)
    paths = ["/etc/hostname", "/etc/nothing", f"{root}/../../../etc/hostname", f"{root}/link/hostname", str(root), ""]
    paths += [f"{root}/blobs", f"{root}//etc/hostname", "blobs", f"{root}/blobs/../../snapshot/metadata.db"]
    messages = set()
    for path in paths:
        requests = (
            (snapshot.DIFF_APPLY, snapshot.ApplyLayer(descriptor=blob, path=path, mounts=mounts)),
            (
                snapshot.SNAPSHOT_UNPACK,
                snapshot.UnpackLayer(name="x", descriptor=blob, path=path, diff_id=image.diff_ids[0]),
            ),
        )
        for verb, request in requests:
            with pytest.raises(ShoalError) as error:
                await client.operate(verb, request, timeout=30)  # type: ignore[arg-type]
            messages.add((error.value.code, error.value.message, error.value.hint))
    assert len(messages) == 1, messages
    # One that may be read doesn't tell its content either.
    (root / "blobs" / "secret").write_text("secret")
    request = snapshot.ApplyLayer(
        descriptor=blob.model_copy(update={"size": 6}), path=f"{root}/blobs/secret", mounts=mounts
    )
    with pytest.raises(ShoalError) as error:
        await client.operate(snapshot.DIFF_APPLY, request, timeout=30)
    told = str(error.value).replace(digest, "")
    assert "sha256:" not in told


async def test_a_registry_that_drips_is_given_up(
    tmp_path: Path, between: Proxy, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_FLOOR_SECONDS", 0.5)
    monkeypatch.setattr(fetch, "_FLOOR_BYTES", 5_000)
    digest = image.layers[0]
    layer = Descriptor(media_type=image.blobs[digest][0], digest=digest, size=len(image.blobs[digest][1]))

    async def drip(request: web.Request) -> web.StreamResponse | None:
        answer = web.StreamResponse(headers={"Content-Length": str(layer.size)})
        await answer.prepare(request)
        with_pause = image.blobs[digest][1]
        for at in range(0, len(with_pause), 100):
            await answer.write(with_pause[at : at + 100])
            await asyncio.sleep(0.05)
        return answer

    between.hook = drip
    database = Database(tmp_path / "metadata.db", "test", MIGRATIONS, service="content")
    locks = Locks(tmp_path / "locks")
    try:
        layout = Layout(tmp_path / "content")
        store = Store(database, layout)
        ingests = Ingests(database, layout, store)
        holds = Holds(database, store, ingests, Trees(store))
        holds.begin("pull", "default")
        wanted = reference.parse(f"{between.host}/app")
        async with HttpResolver(wanted) as resolver:
            fetcher = fetch.Fetcher(database, store, ingests, holds, locks)
            with pytest.raises(Unavailable, match="too slowly"):
                await fetcher.fetch("pull", "default", resolver, wanted, layer, asyncio.Semaphore(1), lambda _: None)
            assert len(between.blob_requests(digest)) == 2
            between.hook = None
            assert await fetcher.fetch("pull", "default", resolver, wanted, layer, asyncio.Semaphore(1), lambda _: None)
        assert between.blob_requests(digest)[-1].range.startswith("bytes=")  # what had come was kept
    finally:
        locks.close()
        database.close()
