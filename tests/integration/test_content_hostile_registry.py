"""Registries that lie in headers, drip, loop and reset: for pulls, through the resolver and through the service."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import Code, FailedPrecondition, ShoalError, Unavailable
from shoal_bus.image_reference import Reference
from shoal_bus.types import Descriptor
from shoal_content.registry.http import HttpResolver
from shoal_content.registry.transport import Patience

from tests.support import images
from tests.support.content_proxy import Proxy, proxy
from tests.support.images import Image, Layer, digest_of, file
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running
from tests.support.resolver_suite import DATA, descriptor_of, read, source_of

QUICK = Patience(tries=2, read_seconds=1.0, commit_seconds=1.0, slow_seconds=1.0, slow_bytes=1000, longest_wait=3.0)


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
    images.push(built, registry.host, "app", "latest")
    return built


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.environment["DOCKER_CONFIG"] = str(tmp_path / "docker")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> AsyncIterator[Client]:
    """Fails the test in which the service met what it hadn't foreseen."""
    node.start("content")
    yield Client(connection, node.name)
    assert "Traceback" not in node.of("content").log.read_text()


async def pull(client: Client, between: Proxy, **options: Any) -> content.Image:
    request = content.PullImage(name=f"{between.host}/app", snapshotter="")
    return await client.operate(content.IMAGE_PULL, request, timeout=60, **options)


def resolver(between: Proxy, **options: Any) -> HttpResolver:
    return HttpResolver(Reference(between.host, "app", "latest"), patience=QUICK, **options)


# -------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("value", ["²", "-5", "9" * 5000, "soon", "Thu, 99 Foo 1970", "\x01"])
async def test_retry_after_that_makes_no_sense_is_no_failure(
    client: Client, between: Proxy, image: Image, value: str
) -> None:
    refused = 0

    async def busy(request: web.Request) -> web.StreamResponse | None:
        nonlocal refused
        refused += 1
        if refused > 1:
            return None
        assert request.transport is not None
        raw = f"HTTP/1.1 429 Busy\r\nRetry-After: {value}\r\nContent-Length: 0\r\n\r\n"
        request.transport.write(raw.encode())  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        request.transport.abort()
        return web.Response()

    between.hook = busy
    assert (await pull(client, between)).target.digest == image.digest


@pytest.mark.parametrize("how", ["seconds", "date"])
async def test_retry_after_is_waited_for_and_told(client: Client, between: Proxy, image: Image, how: str) -> None:
    refused: list[float] = []

    async def busy(request: web.Request) -> web.StreamResponse | None:
        if refused:
            return None
        refused.append(time.monotonic())
        # A date has whole seconds: of two and a half, two at least are left.
        value = "2" if how == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2.9), usegmt=True)
        return web.Response(status=503, headers={"Retry-After": value})

    between.hook = busy
    told: list[str] = []
    await pull(client, between, on_progress=lambda p: told.append(p.waiting))
    assert time.monotonic() - refused[0] >= 1.8
    assert any("waiting" in one for one in told)
    assert told[-1] == ""


async def test_wait_beyond_reason_is_an_error_that_says_how_long(between: Proxy, image: Image) -> None:
    async def busy(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=429, headers={"Retry-After": "86400"})

    between.hook = busy
    began = time.monotonic()
    async with resolver(between) as opened:
        with pytest.raises(Unavailable, match="86400"):
            await opened.resolve(Reference(between.host, "app", "latest"))
    assert time.monotonic() - began < 3
    assert len(between.seen) == 1


@pytest.mark.parametrize(
    "value", ["bytes ²-3/4", f"bytes {'9' * 4000}-1/2", "bytes -", "", "items 0-1/2", "bytes 9999999-"]
)
async def test_content_range_that_makes_no_sense_is_no_crash(
    client: Client, between: Proxy, image: Image, value: str
) -> None:
    between.cut_after = 200_000

    async def lie(request: web.Request) -> web.StreamResponse | None:
        if "Range" not in request.headers:
            return None
        headers = {"Content-Range": value} if value else {}
        return web.Response(status=206, body=b"x" * 10, headers=headers)

    between.hook = lie
    with pytest.raises(ShoalError) as raised:
        await pull(client, between)
    assert raised.value.code in (Code.DATA_LOSS, Code.UNAVAILABLE)


@pytest.mark.parametrize(
    "location",
    [
        "http://[bad",
        "http://127.0.0.1:99999/",
        "",
        "gopher://x/",
        "//",
        "http:///",
        "http://u:p@127.0.0.1/",
        "\\\\x",
        "a b",
    ],
)
async def test_redirect_that_leads_nowhere_is_a_clear_error(
    client: Client, between: Proxy, image: Image, location: str
) -> None:
    async def redirect(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=302, headers={"Location": location} if location else {})

    between.hook = redirect
    with pytest.raises(ShoalError, match=between.host) as raised:
        await pull(client, between)
    assert raised.value.code in (Code.FAILED_PRECONDITION, Code.UNAVAILABLE, Code.NOT_FOUND)


async def test_redirect_loop_ends(client: Client, between: Proxy, image: Image) -> None:
    async def loop(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=307, headers={"Location": f"/v2/app/x{len(between.seen)}"})

    between.hook = loop
    with pytest.raises(FailedPrecondition, match="redirects more than"):
        await pull(client, between)
    assert len(between.seen) <= 10


@pytest.mark.parametrize("raw", [b"\0\0\0", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
                                 b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", b""])  # fmt: skip
async def test_what_isnt_http_is_unavailable(client: Client, between: Proxy, image: Image, raw: bytes) -> None:
    async def speak(request: web.Request) -> web.StreamResponse | None:
        assert request.transport is not None
        request.transport.write(raw)  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        request.transport.abort()
        return web.Response()

    between.hook = speak
    with pytest.raises(ShoalError, match=between.host) as raised:
        await pull(client, between)
    assert raised.value.code in (Code.UNAVAILABLE, Code.FAILED_PRECONDITION)


# ----------------------------------------------------------------------------------------------------------------- slow


async def _drip(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Length": str(len(DATA))})
    await answer.prepare(request)
    try:
        for _ in range(200):
            await answer.write(b"x")
            await asyncio.sleep(0.05)
    except ConnectionError:
        pass  # it had enough
    return answer


async def test_body_that_drips_is_given_up(between: Proxy, image: Image) -> None:
    between.hook = _drip
    reference = Reference(between.host, "app", "latest")
    began = time.monotonic()
    async with resolver(between) as opened:
        with pytest.raises(Unavailable, match="too slowly"):
            await read(opened, reference, descriptor_of(DATA))
        with pytest.raises(Unavailable, match="too slowly"):
            await opened.resolve(reference)
    assert time.monotonic() - began < 8


async def test_slow_reader_isnt_the_registrys_fault(between: Proxy, image: Image, registry: Registry) -> None:
    reference = Reference(between.host, "app", "latest")
    layer = image.blobs[image.layers[0]][1]
    async with (
        resolver(between) as opened,
        opened.blob(reference, descriptor_of(layer)) as body,
    ):
        size = 0
        async for chunk in body.chunks:
            if not size:
                await asyncio.sleep(QUICK.slow_seconds * 1.5)
            size += len(chunk)
    assert size == len(layer)


async def test_registry_that_doesnt_read_what_it_is_sent_is_given_up(between: Proxy, image: Image) -> None:
    async def deaf(request: web.Request) -> web.StreamResponse | None:
        if request.method not in ("PUT", "PATCH"):
            return None
        await asyncio.sleep(30)
        return web.Response()

    between.hook = deaf
    reference = Reference(between.host, "app", "latest")
    data = DATA * 40
    began = time.monotonic()
    async with resolver(between, push=True) as opened:
        with pytest.raises(Unavailable):
            await opened.upload(reference, descriptor_of(data), source_of(data))
    assert time.monotonic() - began < 25


# ------------------------------------------------------------------------------------------------------------ manifests


async def test_index_that_names_itself_or_another_index_is_refused(
    client: Client, between: Proxy, image: Image
) -> None:
    def index_of(digest: str, size: int) -> bytes:
        entry = {
            "mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": "amd64"},
        }  # fmt: skip
        made = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
        return json.dumps(made).encode()

    inner = index_of(digest_of(b"whatever"), 8)
    for named in (digest_of(b"itself"), digest_of(inner)):
        outer = index_of(named, len(inner))

        async def serve(request: web.Request, outer: bytes = outer) -> web.StreamResponse | None:
            if "/manifests/" not in request.path:
                return None
            body = inner if request.path.endswith(digest_of(inner)) else outer
            return web.Response(body=body, content_type="application/vnd.oci.image.index.v1+json")

        between.hook = serve
        with pytest.raises(ShoalError) as raised:
            await pull(client, between)
        assert raised.value.code in (Code.DATA_LOSS, Code.FAILED_PRECONDITION)
        assert len(between.seen) < 20


@pytest.mark.parametrize(
    "kind", ["text/html", "application/vnd.docker.distribution.manifest.v1+prettyjws", "", "x" * 5000]
)
async def test_content_type_is_believed_only_where_the_manifest_says_nothing(
    client: Client, between: Proxy, image: Image, kind: str
) -> None:
    async def serve(request: web.Request) -> web.StreamResponse | None:
        if "/manifests/" not in request.path:
            return None
        return web.Response(body=image.manifest, headers={"Content-Type": kind})

    between.hook = serve
    if "prettyjws" in kind:
        with pytest.raises(FailedPrecondition, match="schema 1"):
            await pull(client, between)
    else:
        assert (await pull(client, between)).target.digest == image.digest


@pytest.mark.parametrize("at", ["manifests", "config", "layer"])
async def test_reset_at_any_stage_is_tried_again(client: Client, between: Proxy, image: Image, at: str) -> None:
    [config] = set(image.blobs) - set(image.layers)
    marker = {"manifests": "/manifests/", "config": config, "layer": image.layers[0]}[at]
    resets = 0

    async def reset(request: web.Request) -> web.StreamResponse | None:
        nonlocal resets
        if marker in request.path and resets < 2:
            resets += 1
            assert request.transport is not None
            request.transport.abort()
        return None

    between.hook = reset
    assert (await pull(client, between)).target.digest == image.digest
    assert resets == 2


async def test_referrers_without_an_end_are_bounded(between: Proxy, image: Image) -> None:
    reference = Reference(between.host, "app", "latest")
    target = Descriptor(media_type=image.media_type, digest=image.digest, size=len(image.manifest))
    pages = 0
    entry = {"mediaType": image.media_type, "digest": image.digest, "size": 5}
    body = json.dumps({"schemaVersion": 2, "manifests": [entry] * 100}).encode()
    link = "</v2/app/referrers/{}>; rel=next"

    async def serve(request: web.Request) -> web.StreamResponse | None:
        nonlocal pages
        pages += 1
        return web.Response(body=body, headers={"Link": link.format(pages)})

    between.hook = serve
    async with resolver(between) as opened:
        with pytest.raises(FailedPrecondition, match="refer to it"):
            await opened.referrers(reference, target.digest)
        assert pages <= 64
        link = "<http://127.0.0.1:1/v2/>; rel=next"
        with pytest.raises(FailedPrecondition, match="another registry"):
            await opened.referrers(reference, target.digest)
