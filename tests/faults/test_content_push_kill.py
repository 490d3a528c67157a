"""The content service is killed in the middle of pushes: the next copy goes on, and the registry has all of it."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import InvalidArgument

from tests.support.content_proxy import Proxy, proxy
from tests.support.images import Image, Layer, file
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running
from tests.support.stored import store

SEED = 20261125


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


@pytest.fixture
async def between(registry: Registry) -> AsyncIterator[Proxy]:
    async with proxy(registry.host) as made:

        async def slowly(request: web.Request) -> web.StreamResponse | None:
            await asyncio.sleep(0.03)
            # No blob is mounted: each push sends all of it.
            return web.Response(status=403) if "mount" in request.query else None

        made.hook = slowly
        yield made


@pytest.fixture
def image() -> Image:
    generator = random.Random(SEED)
    return Image.build([Layer([file(f"data{n}", generator.randbytes(300_000))], "gzip") for n in range(4)])


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.environment["DOCKER_CONFIG"] = str(tmp_path / "docker")
        started.start("content")
        yield started


@pytest.fixture
def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


async def check(client: Client, node: TestNode, registry: Registry, image: Image, repository: str) -> None:
    """The registry has the image whole (a namespace that has nothing yet pulls it), and nothing is held any more."""
    namespace = client.with_namespace(f"check-{repository}")
    request = content.PullImage(name=f"{registry.host}/{repository}", snapshotter="")
    assert (await namespace.operate(content.IMAGE_PULL, request, timeout=60)).target.digest == image.digest
    place = registry.directory / f"data/docker/registry/v2/repositories/{repository}/_layers/sha256"
    assert {f"sha256:{one.name}" for one in place.iterdir()} == set(image.blobs)
    with closing(sqlite3.connect(node.root / "content" / "metadata.db", timeout=10)) as database:
        assert database.execute("SELECT count(*) FROM holds").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM pulls").fetchone() == (0,)


@pytest.mark.timeout(240)
async def test_push_is_finished_by_the_next_copy_wherever_the_first_is_killed(
    node: TestNode, client: Client, between: Proxy, registry: Registry, image: Image
) -> None:
    await store(client, image, "app")
    loop = asyncio.get_running_loop()
    began = loop.time()
    await client.operate(content.IMAGE_PUSH, content.PushImage(name="app", destination=f"{between.host}/first"))
    length = loop.time() - began
    generator, rounds = random.Random(SEED), 8
    for number in range(rounds):
        request = content.PushImage(name="app", destination=f"{between.host}/round{number}", max_concurrent_uploads=2)
        pushing = asyncio.create_task(
            client.operate(content.IMAGE_PUSH, request, id=f"push-{number}", timeout=60, patience=20)
        )
        await asyncio.sleep(length * (number + generator.random()) / rounds)
        node.of("content").kill()
        await asyncio.to_thread(node.of("content").start)
        pushed = await pushing
        assert pushed.target.digest == image.digest, f"after kill number {number}"
        await check(client, node, registry, image, f"round{number}")
        before = len(between.seen)
        assert await client.operate(content.IMAGE_PUSH, request, id=f"push-{number}") == pushed
        assert len(between.seen) == before, "an answer that is known was asked of the registry again"
        other = request.model_copy(update={"plain_http": True})
        with pytest.raises(InvalidArgument):
            await client.operate(content.IMAGE_PUSH, other, id=f"push-{number}")


async def test_another_copy_takes_a_push_over(
    node: TestNode, client: Client, between: Proxy, registry: Registry, image: Image
) -> None:
    node.start("content")
    await store(client, image, "app")
    requests = [content.PushImage(name="app", destination=f"{between.host}/n{n}") for n in range(4)]
    pushes = [asyncio.create_task(client.operate(content.IMAGE_PUSH, one, timeout=60)) for one in requests]
    await asyncio.sleep(0.15)
    node.of("content", 0).kill()
    assert {one.target.digest for one in await asyncio.gather(*pushes)} == {image.digest}
    for number in range(4):
        await check(client, node, registry, image, f"n{number}")


async def test_stopped_copy_leaves_its_push_to_the_next(
    node: TestNode, client: Client, between: Proxy, registry: Registry, image: Image
) -> None:
    await store(client, image, "app")
    request = content.PushImage(name="app", destination=f"{between.host}/app")
    pushing = asyncio.create_task(client.operate(content.IMAGE_PUSH, request, timeout=60, patience=20))
    while not [one for one in between.seen if one.method == "POST"]:
        await asyncio.sleep(0.01)
    assert await asyncio.to_thread(node.of("content").stop) == 0
    await asyncio.to_thread(node.of("content").start)
    assert (await pushing).target.digest == image.digest
    await check(client, node, registry, image, "app")
