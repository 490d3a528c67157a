"""Registries that refuse, redirect, break off and lie: a proxy in front of a real one."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import DataLoss, FailedPrecondition, NotFound, PermissionDenied, Unauthenticated, Unavailable

from tests.support.content_proxy import Proxy, proxy
from tests.support.images import Image, Layer, file, push
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running

DATA = b"".join(number.to_bytes(4, "big") for number in range(200_000))
SECRET = "s3cr3t-pa55"
SECRET_BCRYPT = "$2b$04$eqZkAqAwF8FPtc1AEyw2reJcSe5K/N431Xb/WSveuwQtSO1gPRi4m"


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
    built = Image.build([Layer([file("data", DATA)], "none")])
    push(built, registry.host, "app")
    return built


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        docker = tmp_path / "docker"
        docker.mkdir()
        started.environment["DOCKER_CONFIG"] = str(docker)
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> AsyncIterator[Client]:
    """Fails the test that leaves a credential in a log, or anything of a failed pull on disk."""
    node.start("content", arguments=("--log-level", "debug"))
    made = Client(connection, node.name)
    yield made
    assert SECRET not in node.of("content").log.read_text()
    assert base64.b64encode(f"user:{SECRET}".encode()).decode() not in node.of("content").log.read_text()


def log_in(node: TestNode, host: str) -> None:
    auth = base64.b64encode(f"user:{SECRET}".encode()).decode()
    config = Path(node.environment["DOCKER_CONFIG"]) / "config.json"
    config.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


async def pull(client: Client, host: str) -> content.Image:
    return await client.operate(content.IMAGE_PULL, content.PullImage(name=f"{host}/app", snapshotter=""), timeout=60)


def left(node: TestNode) -> list[str]:
    root = node.root / "content"
    return [str(p) for part in ("blobs", "ingests") for p in (root / part).rglob("*") if p.is_file()]


async def test_cut_connections_are_resumed_by_range(client: Client, between: Proxy, image: Image) -> None:
    between.cut_after = 300_000
    await pull(client, between.host)
    ranges = [one.range for one in between.blob_requests(image.layers[0])]
    assert ranges[0] == ""
    assert len(ranges) >= 3
    assert all(one.startswith("bytes=") for one in ranges[1:])


async def test_wrong_bytes_are_data_loss_and_leave_nothing(
    client: Client, between: Proxy, image: Image, node: TestNode
) -> None:
    wrong = b"\0" * len(image.blobs[image.layers[0]][1])

    async def lie(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=wrong) if request.path.endswith(image.layers[0]) else None

    between.hook = lie
    with pytest.raises(DataLoss, match=image.layers[0]):
        await pull(client, between.host)
    assert left(node) == []
    assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []


async def test_blob_that_is_too_long_or_too_short_is_data_loss(
    client: Client, between: Proxy, image: Image, node: TestNode
) -> None:
    whole = image.blobs[image.layers[0]][1]
    for body in (whole + b"more", whole[: len(whole) // 2], b""):

        async def lie(request: web.Request, body: bytes = body) -> web.StreamResponse | None:
            return web.Response(body=body) if request.path.endswith(image.layers[0]) else None

        between.hook = lie
        with pytest.raises(DataLoss):
            await pull(client, between.host)
        assert left(node) == []


async def test_manifest_of_other_bytes_and_huge_ones_are_refused(
    client: Client, between: Proxy, image: Image, node: TestNode
) -> None:
    async def huge(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=b" " * (5 << 20)) if "/manifests/" in request.path else None

    between.hook = huge
    with pytest.raises(FailedPrecondition, match="manifest"):
        await pull(client, between.host)
    between.hook = None
    name = f"{between.host}/app@sha256:{'0' * 64}"

    async def other(request: web.Request) -> web.StreamResponse | None:
        return (
            web.Response(body=image.manifest, content_type=image.media_type) if "/manifests/" in request.path else None
        )

    between.hook = other
    with pytest.raises(DataLoss):
        await client.operate(content.IMAGE_PULL, content.PullImage(name=name, snapshotter=""))
    assert left(node) == []


async def test_basic_authentication_of_a_real_registry(client: Client, node: TestNode, tmp_path: Path) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(f"user:{SECRET_BCRYPT}\n")
    with running(tmp_path / "private", htpasswd=users) as private:
        with pytest.raises(Unauthenticated, match=r"config\.json"):
            await pull(client, private.host)
        log_in(node, private.host)
        with pytest.raises(NotFound):  # let in, and nothing there
            await pull(client, private.host)


async def test_bearer_token_is_gotten_with_the_credential_and_used(
    client: Client, between: Proxy, image: Image, node: TestNode
) -> None:
    asked: list[tuple[str, str]] = []

    async def guard(request: web.Request) -> web.StreamResponse | None:
        if request.path == "/token":
            asked.append((request.headers.get("Authorization", ""), request.query.get("scope", "")))
            if not request.headers.get("Authorization", ""):
                return web.Response(status=401)
            return web.json_response({"token": "tok-1"})
        if request.headers.get("Authorization", "") != "Bearer tok-1":
            challenge = f'Bearer realm="http://{between.host}/token",service="s",scope="repository:app:pull"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return None

    between.hook = guard
    with pytest.raises(Unauthenticated):
        await pull(client, between.host)
    log_in(node, between.host)
    await pull(client, between.host)
    assert asked[-1] == ("Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode(), "repository:app:pull")


async def test_redirect_takes_no_credential_to_another_host(
    client: Client, between: Proxy, image: Image, node: TestNode, registry: Registry
) -> None:
    async with proxy(registry.host) as elsewhere:

        async def guard(request: web.Request) -> web.StreamResponse | None:
            if not request.headers.get("Authorization", ""):
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            if "/blobs/" in request.path:
                return web.Response(status=307, headers={"Location": f"http://{elsewhere.host}{request.path}"})
            return await between.forward(request)

        between.hook = guard
        log_in(node, between.host)
        await pull(client, between.host)
        assert elsewhere.seen
        assert {one.authorization for one in elsewhere.seen} == {""}


async def test_refusals_have_their_codes(client: Client, between: Proxy, image: Image, node: TestNode) -> None:
    for status, error in (401, Unauthenticated), (403, PermissionDenied), (429, Unavailable), (503, Unavailable):

        async def refuse(request: web.Request, status: int = status) -> web.StreamResponse | None:
            return web.Response(status=status, headers={"Retry-After": "0"})

        between.hook = refuse
        with pytest.raises(error, match=between.host):
            await pull(client, between.host)
    assert left(node) == []


async def test_too_many_requests_is_waited_out(client: Client, between: Proxy, image: Image) -> None:
    count = 0

    async def busy(request: web.Request) -> web.StreamResponse | None:
        nonlocal count
        count += 1
        return web.Response(status=429, headers={"Retry-After": "0"}) if count % 2 else None

    between.hook = busy
    await pull(client, between.host)


async def test_cancelled_pull_leaves_nothing(client: Client, between: Proxy, image: Image, node: TestNode) -> None:
    between.pause = 0.05
    pulling = asyncio.create_task(pull(client, between.host))
    while not between.blob_requests(image.layers[0]):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert left(node)
    pulling.cancel()
    await asyncio.gather(pulling, return_exceptions=True)
    for _ in range(100):
        if not left(node) and not await client.collect(content.BLOB_LIST, content.ListBlobs()):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(left(node))


async def test_pulls_of_one_image_fetch_each_blob_once_in_a_namespace(
    client: Client, between: Proxy, image: Image, node: TestNode
) -> None:
    between.pause = 0.002
    target = f"{between.host}/app@{image.digest}"
    namespaces = [client.with_namespace(name) for name in ("a", "b", "c")]
    for one in namespaces:
        name = f"{between.host}/app:latest"
        requests = [content.PullImage(name=name, snapshotter="") for name in (name, target)]
        await asyncio.gather(*(one.operate(content.IMAGE_PULL, request) for request in requests))
    # Each namespace has to come to the bytes itself; they are on disk once.
    assert {digest: len(between.blob_requests(digest)) for digest in image.blobs} == dict.fromkeys(image.blobs, 3)
    assert len(left(node)) == len(image.blobs) + 1


async def test_a_digest_alone_shows_a_namespace_nothing(
    client: Client, between: Proxy, registry: Registry, image: Image
) -> None:
    """A manifest that names another namespace's blobs, in a registry that hasn't got them."""
    await pull(client, between.host)
    secret = image.layers[0]

    async def withhold(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=404) if request.path.endswith(secret) else None

    between.hook = withhold
    thief = client.with_namespace("thief")
    with pytest.raises(NotFound):
        await pull(thief, between.host)
    assert await thief.collect(content.BLOB_LIST, content.ListBlobs()) == []
    with pytest.raises(NotFound):
        await thief.collect(content.BLOB_READ, content.ReadBlob(digest=secret))


async def test_a_slow_registry_keeps_no_other_namespace_waiting(client: Client, between: Proxy, image: Image) -> None:
    begun = asyncio.Event()

    async def drip(request: web.Request) -> web.StreamResponse | None:
        if begun.is_set() or not request.path.endswith(image.layers[0]):
            return None
        begun.set()
        answer = web.StreamResponse(headers={"Content-Length": str(len(image.blobs[image.layers[0]][1]))})
        await answer.prepare(request)
        while True:
            await answer.write(b"x")
            await asyncio.sleep(0.2)

    between.hook = drip
    slow = asyncio.create_task(pull(client, between.host))
    async with asyncio.timeout(20):
        await begun.wait()
        await pull(client.with_namespace("other"), between.host)
    assert not slow.done()
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
