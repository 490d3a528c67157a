"""Pushes to a real registry, and to one that breaks off, refuses and lies."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from shoal_bus.types import Descriptor

from tests.support.content_proxy import Proxy, proxy
from tests.support.images import Image, Layer, digest_of, file
from tests.support.natsd import NatsServer, free_port
from tests.support.node import TestNode
from tests.support.registry import Registry, running
from tests.support.stored import store, store_blob

SECRET = "s3cr3t-pa55"
SECRET_BCRYPT = "$2b$04$eqZkAqAwF8FPtc1AEyw2reJcSe5K/N431Xb/WSveuwQtSO1gPRi4m"
INDEX, MANIFEST = "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"
DATA = random.Random(1125).randbytes(3 << 20)


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
        started.environment["DOCKER_CONFIG"] = str(tmp_path / "docker")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> AsyncIterator[Client]:
    node.start("content", arguments=("--log-level", "debug"))
    yield Client(connection, node.name)
    log = node.of("content").log.read_text()
    assert SECRET not in log
    assert "Traceback" not in log


@pytest.fixture
def image() -> Image:
    return Image.build([Layer([file("small", b"s" * 1000)], "gzip"), Layer([file("large", DATA)], "none")])


async def push(client: Client, to: str, name: str = "app", **options: Any) -> content.PushedImage:
    return await client.operate(content.IMAGE_PUSH, content.PushImage(name=name, destination=to, **options), timeout=60)


def served(registry: Registry, path: str, accept: str = "*/*") -> bytes:
    request = urllib.request.Request(f"{registry.url}/v2/{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


def has(registry: Registry, path: str) -> bool:
    try:
        served(registry, path, "application/vnd.oci.image.manifest.v1+json")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return False
    return True


def uploads(registry: Registry, repository: str = "team/app") -> list[str]:
    """The uploads under way. Of one that was taken back, this registry leaves a directory that holds no data."""
    place = registry.directory / f"data/docker/registry/v2/repositories/{repository}/_uploads"
    return [one.parent.name for one in place.glob("*/startedat")]


# ---------------------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("flavour", ["oci", "docker"])
async def test_pushed_image_is_the_same_byte_for_byte(client: Client, registry: Registry, flavour: Any) -> None:
    layers = [Layer([file(kind, b"x" * 5000)], kind) for kind in ("none", "gzip", "zstd")]  # type: ignore[arg-type]
    image = Image.build(layers, flavour=flavour)
    await store(client, image, "app")
    seen: list[content.PushProgress] = []
    request = content.PushImage(name="app", destination=f"{registry.host}/team/app:v1")
    pushed = await client.operate(content.IMAGE_PUSH, request, on_progress=seen.append)
    assert (pushed.name, pushed.target.digest) == (f"{registry.host}/team/app:v1", image.digest)
    assert served(registry, "team/app/manifests/v1", image.media_type) == image.manifest
    for digest, (_, data) in image.blobs.items():
        assert served(registry, f"team/app/blobs/{digest}") == data
    assert uploads(registry) == []
    if flavour == "oci":  # of Docker's types, that tool knows no zstd
        inspect = ["skopeo", "inspect", "--tls-verify=false", f"docker://{registry.host}/team/app:v1"]
        inspected = json.loads(subprocess.run(inspect, check=True, capture_output=True, timeout=60).stdout)
        assert (inspected["Digest"], inspected["Layers"]) == (image.digest, image.layers)
    if seen:  # the end may overtake all of it
        assert seen[-1].bytes_total in (0, sum(len(data) for _, data in image.blobs.values()))
    other = client.with_namespace("other")
    pulled = await other.operate(content.IMAGE_PULL, content.PullImage(name=pushed.name, snapshotter=""))
    assert pulled.target.digest == image.digest


async def test_progress_tells_of_each_blob_and_of_the_rate(client: Client, between: Proxy, image: Image) -> None:
    await store(client, image, "app")
    seen: list[content.PushProgress] = []

    async def slowly(request: web.Request) -> None:
        if request.method == "PUT":
            await asyncio.sleep(0.5)

    between.hook = slowly
    request = content.PushImage(name="app", destination=f"{between.host}/team/app")
    await client.operate(content.IMAGE_PUSH, request, on_progress=seen.append)
    total = sum(len(data) for _, data in image.blobs.values())
    pushing = [one for one in seen if one.state == "pushing"]
    assert {blob.digest for one in pushing for blob in one.blobs} == set(image.blobs)
    assert "uploading" in {blob.state for one in pushing for blob in one.blobs}
    assert {one.bytes_total for one in pushing} == {total}
    assert any(one.rate > 0 for one in seen)
    assert all(0 <= one.bytes_done <= total for one in seen)


async def test_what_the_registry_has_isnt_sent_again(client: Client, between: Proxy, image: Image) -> None:
    await store(client, image, "app")
    await push(client, f"{between.host}/team/app:v1")
    before = len(between.seen)
    await push(client, f"{between.host}/team/app:v2")
    again = between.seen[before:]
    assert {one.method for one in again} == {"HEAD", "PUT"}
    assert [one.path for one in again if one.method == "PUT"] == ["/v2/team/app/manifests/v2"]


async def test_blob_of_another_repository_is_mounted(client: Client, between: Proxy, image: Image) -> None:
    await store(client, image, "app")
    await push(client, f"{between.host}/team/base")
    before = len(between.seen)
    await push(client, f"{between.host}/team/app")
    posts = [one for one in between.seen[before:] if one.method == "POST"]
    assert len(posts) == len(image.blobs)
    assert all("from=team/base" in one.query or "from=team%2Fbase" in one.query for one in posts)
    assert not [one for one in between.seen[before:] if one.method in ("PUT", "PATCH") and "/blobs/" in one.path]
    digest = image.layers[0]
    info = await client.call(content.BLOB_INFO, content.BlobRequest(digest=digest))
    assert info.labels[f"containerd.io/distribution.source.{between.host}"] == "team/app,team/base"


async def test_pulled_blobs_know_where_they_came_from_and_are_mounted(
    client: Client, between: Proxy, image: Image
) -> None:
    await store(client, image, "app")
    await push(client, f"{between.host}/team/base")
    other = client.with_namespace("other")
    pulled = await other.operate(
        content.IMAGE_PULL, content.PullImage(name=f"{between.host}/team/base", snapshotter="")
    )
    before = len(between.seen)
    await push(other, f"{between.host}/team/app", pulled.name)
    assert not [one for one in between.seen[before:] if one.method in ("PUT", "PATCH") and "/blobs/" in one.path]


async def test_one_platform_of_an_index_or_all_of_them(client: Client, registry: Registry) -> None:
    images = {name: Image.build([Layer([file("a", name.encode())])], architecture=name) for name in ("amd64", "s390x")}
    index = Image.index(list(images.values()))
    await store(client, index, "app")
    one = await push(client, f"{registry.host}/team/one", platform="linux/s390x")
    assert one.target.digest == images["s390x"].digest
    assert not has(registry, f"team/one/manifests/{images['amd64'].digest}")
    everything = await push(client, f"{registry.host}/team/all:v1", all_platforms=True)
    assert everything.target.digest == index.digest
    assert served(registry, "team/all/manifests/v1", index.media_type) == index.manifest
    for image in images.values():
        assert has(registry, f"team/all/manifests/{image.digest}")
    with pytest.raises(NotFound, match=r"riscv64.*amd64.*s390x"):
        await push(client, f"{registry.host}/team/none", platform="linux/riscv64")


async def test_platform_that_isnt_here_must_be_in_the_registry(client: Client, registry: Registry) -> None:
    images = [Image.build([Layer([file("a", name.encode())])], architecture=name) for name in ("amd64", "s390x")]
    index = Image.index(images)
    await store(client, index, "whole")
    await push(client, f"{registry.host}/team/app:v1", "whole", all_platforms=True)
    other = client.with_namespace("other")
    name = f"{registry.host}/team/app:v1"
    await other.operate(content.IMAGE_PULL, content.PullImage(name=name, platform="linux/amd64", snapshotter=""))
    with pytest.raises(NotFound, match=images[1].digest):
        await push(other, f"{registry.host}/team/elsewhere", name, all_platforms=True)
    assert not has(registry, "team/elsewhere/manifests/latest")
    pushed = await push(other, f"{registry.host}/team/app:again", name, all_platforms=True)
    assert pushed.target.digest == index.digest


async def test_artifacts_are_pushed_as_they_are_and_refer_to_images(client: Client, registry: Registry) -> None:
    image = Image.build([Layer([file("f")])])
    await store(client, image, "app")
    await push(client, f"{registry.host}/team/app:v1")
    sbom = b'{"sbom": true}'
    subject = {"mediaType": image.media_type, "digest": image.digest, "size": len(image.manifest)}
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2}
    layer = {"mediaType": "application/vnd.example.sbom+json", "digest": digest_of(sbom), "size": len(sbom)}
    manifest = json.dumps(
        {"schemaVersion": 2, "mediaType": image.media_type, "artifactType": "application/vnd.example.sbom",
         "config": config, "layers": [layer], "subject": subject}
    ).encode()  # fmt: skip
    blobs = {digest_of(b"{}"): (config["mediaType"], b"{}"), digest_of(sbom): (layer["mediaType"], sbom)}
    await store(client, Image(image.media_type, manifest, blobs), "sbom")  # type: ignore[arg-type]
    await push(client, f"{registry.host}/team/app:sbom", "sbom")
    assert served(registry, "team/app/manifests/sbom", image.media_type) == manifest
    request = content.ListReferrers(name=f"{registry.host}/team/app:v1")
    found = await client.collect(content.REFERRER_LIST, request)
    assert [(one.subject, one.descriptor.digest, one.artifact_type) for one in found] == [
        (image.digest, digest_of(manifest), "application/vnd.example.sbom")
    ]
    none = request.model_copy(update={"artifact_type": "application/vnd.example.other"})
    assert await client.collect(content.REFERRER_LIST, none) == []


async def test_layers_that_may_not_be_handed_on_are_skipped(client: Client, registry: Registry) -> None:
    image = Image.build([Layer([file("f")])])
    document = json.loads(image.manifest)
    foreign = {
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": digest_of(b"elsewhere"),
        "size": 9, "urls": ["https://elsewhere.example/layer"],
    }  # fmt: skip
    document["layers"].append(foreign)
    image = replace(image, manifest=json.dumps(document).encode())
    await store(client, image, "app")
    seen: list[content.PushProgress] = []
    request = content.PushImage(name="app", destination=f"{registry.host}/team/app:v1")
    try:
        await client.operate(content.IMAGE_PUSH, request, on_progress=seen.append)
    except FailedPrecondition as refused:  # this registry wants such layers' urls allowed in its configuration
        assert "MANIFEST" in refused.message or "invalid" in refused.message.lower()  # noqa: PT017
    assert not has(registry, f"team/app/blobs/{digest_of(b'elsewhere')}")
    for digest in image.blobs:
        assert served(registry, f"team/app/blobs/{digest}")


async def test_destination_with_a_digest_must_be_what_is_pushed(
    client: Client, registry: Registry, image: Image
) -> None:
    await store(client, image, "app")
    with pytest.raises(InvalidArgument, match=image.digest):
        await push(client, f"{registry.host}/team/app@{digest_of(b'other')}")
    await push(client, f"{registry.host}/team/app@{image.digest}")
    assert has(registry, f"team/app/manifests/{image.digest}")
    assert not has(registry, "team/app/manifests/latest")


async def test_what_cant_be_pushed_has_its_code(client: Client, registry: Registry, image: Image) -> None:
    with pytest.raises(NotFound):
        await push(client, f"{registry.host}/team/app", "nothing/here")
    await store(client, image, "app")
    for bad in ("team/UPPER", "a b", "x:@"):
        with pytest.raises(InvalidArgument):
            await push(client, bad)
    with pytest.raises(InvalidArgument):
        await push(client, f"{registry.host}/x", platform="nonsense/")
    port = free_port()
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port}"):
        await push(client, f"127.0.0.1:{port}/x")
    incomplete = Image.build([Layer([file("f", b"missing")])])
    await store_blob(client, incomplete.manifest)
    await store(client, replace(incomplete, blobs={}), "incomplete")
    with pytest.raises(NotFound, match="isn't on this node"):
        await push(client, f"{registry.host}/team/app", "incomplete")
    assert uploads(registry) == []


async def test_namespace_pushes_only_what_it_sees(client: Client, registry: Registry, image: Image) -> None:
    await store(client, image, "app")
    other = client.with_namespace("other")
    with pytest.raises(NotFound):
        await push(other, f"{registry.host}/team/app")
    target = (await client.call(content.IMAGE_GET, content.ImageRequest(name="app"))).target
    await other.call(content.IMAGE_CREATE, content.CreateImage(name="app", target=target))
    with pytest.raises(NotFound, match=image.digest):
        await push(other, f"{registry.host}/team/app")


def _index_of(*entries: tuple[str, str, int]) -> bytes:
    manifests = [{"mediaType": kind, "digest": digest, "size": size} for kind, digest, size in entries]
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).encode()


async def _create(client: Client, name: str, media_type: str, data: bytes) -> None:
    digest = await store_blob(client, data)
    target = Descriptor(media_type=media_type, digest=digest, size=len(data))
    await client.call(content.IMAGE_CREATE, content.CreateImage(name=name, target=target))


async def test_trees_that_make_no_sense_are_refused_before_anything_is_sent(client: Client, between: Proxy) -> None:
    deep = _index_of()
    for _ in range(12):
        await store_blob(client, deep)
        deep = _index_of((INDEX, digest_of(deep), len(deep)))
    await _create(client, "deep", INDEX, deep)
    wide = _index_of(*((MANIFEST, digest_of(str(n).encode()), 1) for n in range(1500)))
    await _create(client, "wide", INDEX, wide)
    await _create(client, "nonsense", INDEX, b"[]")
    await _create(client, "no-json", MANIFEST, b"\xff\x00")
    child = Image.build([Layer([file("f")])]).manifest
    await store_blob(client, child)
    await _create(client, "wrong-size", INDEX, _index_of((MANIFEST, digest_of(child), len(child) + 1)))
    for name, error in (
        ("deep", FailedPrecondition), ("wide", FailedPrecondition), ("nonsense", FailedPrecondition),
        ("no-json", FailedPrecondition), ("wrong-size", DataLoss),
    ):  # fmt: skip
        with pytest.raises(error):
            await push(client, f"{between.host}/team/app", name, all_platforms=True)
    assert between.seen == []


async def test_manifest_of_a_kind_that_nobody_knows_is_pushed_as_it_is(client: Client, between: Proxy) -> None:
    got: list[tuple[str, bytes]] = []

    async def take(request: web.Request) -> web.StreamResponse | None:
        if request.method != "PUT":
            return None
        got.append((request.headers["Content-Type"], await request.read()))
        return web.Response(status=201)

    between.hook = take
    await _create(client, "odd", "application/vnd.example.odd+json", b'{"odd": true}')
    await push(client, f"{between.host}/team/odd", "odd")
    assert got == [("application/vnd.example.odd+json", b'{"odd": true}')]


# ---------------------------------------------------------------------------------------------------------- credentials


async def test_credential_of_a_request_is_used_and_seen_by_nobody(
    client: Client, image: Image, node: TestNode, tmp_path: Path
) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(f"user:{SECRET_BCRYPT}\n")
    await store(client, image, "app")
    with running(tmp_path / "private", htpasswd=users) as private:
        to = f"{private.host}/team/app"
        with pytest.raises(Unauthenticated):
            await push(client, to)
        for password, works in (("wrong", False), (SECRET, True), ("wrong", False)):
            credential = content.RegistryCredential(registry=private.host, user="user", password=password)
            sealed = await content.seal_credential(client, credential)
            assert SECRET.encode() not in sealed
            if works:
                await push(client, to, credential=sealed)
                pull = content.PullImage(name=to, snapshotter="", credential=sealed)
                await client.with_namespace("other").operate(content.IMAGE_PULL, pull)
            else:
                with pytest.raises(Unauthenticated):
                    await push(client, to, credential=sealed)
        with pytest.raises(Unauthenticated):  # and what it opened is open to nobody else
            await push(client, to)
        with pytest.raises(InvalidArgument, match="another registry"):
            await push(client, "127.0.0.1:1/team/app", credential=sealed)
        with pytest.raises(InvalidArgument, match="sealed"):
            await push(client, to, credential=b"x" * 200)
    kept = b"".join(path.read_bytes() for path in (node.root / "content").glob("*") if path.is_file())
    assert SECRET.encode() not in kept


async def test_service_asks_the_nodes_credential_helper(
    natsd: NatsServer, connection: Connection, image: Image, tmp_path: Path
) -> None:
    users, programs, docker = tmp_path / "htpasswd", tmp_path / "programs", tmp_path / "docker"
    users.write_text(f"user:{SECRET_BCRYPT}\n")
    programs.mkdir()
    docker.mkdir()
    helper = programs / "docker-credential-test"
    helper.write_text(f'#!/bin/sh\nread host; echo "$1 $host" >>{tmp_path}/asked\ncat {tmp_path}/answer\n')
    helper.chmod(0o755)
    (tmp_path / "answer").write_text(json.dumps({"Username": "user", "Secret": SECRET}))
    with (
        running(tmp_path / "private", htpasswd=users) as private,
        TestNode(tmp_path, natsd, path=f"{programs}:/usr/bin:/bin") as node,
    ):
        (docker / "config.json").write_text(json.dumps({"credHelpers": {private.host: "test"}}))
        node.environment["DOCKER_CONFIG"] = str(docker)
        node.start("content")
        client = Client(connection, node.name)
        await store(client, image, "app")
        await push(client, f"{private.host}/team/app")
        assert (tmp_path / "asked").read_text() == f"get {private.host}\n"
        assert SECRET not in node.of("content").log.read_text()


async def test_upload_that_is_sent_elsewhere_takes_no_credential_there(
    client: Client, between: Proxy, registry: Registry, image: Image
) -> None:
    async with proxy(registry.host) as elsewhere:
        moved: list[str] = []

        async def hook(request: web.Request) -> web.StreamResponse | None:
            if not request.headers.get("Authorization", ""):
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            if request.method == "PUT" and "/blobs/" in request.path:
                moved.append(request.path)
                return web.Response(status=307, headers={"Location": f"http://{elsewhere.host}{request.rel_url}"})
            return None

        between.hook = hook
        await store(client, image, "app")
        credential = content.RegistryCredential(registry=between.host, user="user", password=SECRET)
        sealed = await content.seal_credential(client, credential)
        await push(client, f"{between.host}/team/app", credential=sealed)
        assert len(moved) == len(image.blobs)
        assert [one.method for one in elsewhere.seen] == ["PUT"] * len(image.blobs)
        assert {one.authorization for one in elsewhere.seen} == {""}
    for digest, (_, data) in image.blobs.items():
        assert served(registry, f"team/app/blobs/{digest}") == data


# --------------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "lost"])
async def test_upload_that_is_cut_goes_on(client: Client, between: Proxy, image: Image, keeps: bool) -> None:
    between.keeps_what_came = keeps
    between.cuts_of_uploads = [500_000, 1_000_000] if keeps else [500_000]
    await store(client, image, "app")
    await push(client, f"{between.host}/team/app", max_concurrent_uploads=1)
    assert between.cuts_of_uploads == []
    for digest, (_, data) in image.blobs.items():
        with urllib.request.urlopen(f"http://{between.upstream}/v2/team/app/blobs/{digest}", timeout=10) as answer:
            assert answer.read() == data
    assert ("PATCH" in {one.method for one in between.seen}) is keeps


async def test_registry_that_always_breaks_off_is_unavailable(
    client: Client, between: Proxy, registry: Registry, image: Image
) -> None:
    between.cuts_of_uploads = [100] * 1000
    await store(client, image, "app")
    with pytest.raises(Unavailable, match=between.host):
        await push(client, f"{between.host}/team/app")
    assert not has(registry, "team/app/manifests/latest")


@pytest.mark.parametrize("stage", ["HEAD", "POST", "PUT", "manifest"])
async def test_connection_that_is_reset_once_at_any_stage_is_tried_again(
    client: Client, between: Proxy, image: Image, stage: str
) -> None:
    reset = False

    async def hook(request: web.Request) -> web.StreamResponse | None:
        nonlocal reset
        is_manifest = request.method == "PUT" and "/manifests/" in request.path
        at = "manifest" if is_manifest else request.method
        if at == stage and not reset:
            reset = True
            assert request.transport is not None
            request.transport.abort()
        return None

    between.hook = hook
    await store(client, image, "app")
    await push(client, f"{between.host}/team/app")
    assert reset


async def test_answer_that_is_lost_once_it_was_done_is_no_failure(client: Client, between: Proxy, image: Image) -> None:
    async def hook(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PUT" and "/blobs/" in request.path:
            await between.forward_unanswered(request)
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return None

    between.hook = hook
    await store(client, image, "app")
    await push(client, f"{between.host}/team/app")
    puts = [one for one in between.seen if one.method == "PUT" and "/blobs/" in one.path]
    assert len(puts) == len(image.blobs)


async def test_blob_that_is_too_large_at_once_is_sent_in_pieces(client: Client, between: Proxy, image: Image) -> None:
    async def hook(request: web.Request) -> web.StreamResponse | None:
        if int(request.headers.get("Content-Length", "0")) > 1_000_000:
            return web.Response(status=413)
        return None

    between.hook = hook
    await store(client, image, "app")
    await push(client, f"{between.host}/team/app")
    with urllib.request.urlopen(f"http://{between.upstream}/v2/team/app/blobs/{image.layers[1]}", timeout=10) as answer:
        assert answer.read() == image.blobs[image.layers[1]][1]
    between.hook = None

    async def nothing_fits(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=413) if request.method in ("PUT", "PATCH") else None

    between.hook = nothing_fits
    with pytest.raises(FailedPrecondition, match="too large"):
        await push(client, f"{between.host}/team/other")


async def test_refusals_have_their_codes(client: Client, between: Proxy, image: Image, registry: Registry) -> None:
    await store(client, image, "app")
    for status, error in (
        (401, Unauthenticated), (403, PermissionDenied), (405, FailedPrecondition), (400, FailedPrecondition),
        (404, NotFound), (503, Unavailable), (302, Unavailable),
    ):  # fmt: skip

        async def refuse(request: web.Request, status: int = status) -> web.StreamResponse | None:
            if request.method == "HEAD":
                return None
            return web.json_response(
                {"errors": [{"code": "DENIED", "message": "quota\nis \x1b[31mgone"}]}, status=status
            )

        between.hook = refuse
        with pytest.raises(error) as raised:
            await push(client, f"{between.host}/team/app")
        assert between.host in str(raised.value)
        assert str(raised.value).isprintable()
    assert not has(registry, "team/app/manifests/latest")


@pytest.mark.parametrize(
    "location",
    ["", "http://[bad", "http://127.0.0.1:99999/x", "file:///etc/passwd", "http://user:pw@127.0.0.1/", "//", "http:///",
     "x" * 5000, "http://é/"],
)  # fmt: skip
async def test_location_that_leads_nowhere_is_a_clear_error(
    client: Client, between: Proxy, image: Image, location: str
) -> None:
    async def hook(request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST":
            return None
        return web.Response(status=202, headers={"Location": location} if location else {})

    between.hook = hook
    await store(client, image, "app")
    with pytest.raises((FailedPrecondition, NotFound, Unavailable)):
        await push(client, f"{between.host}/team/app")


async def test_registry_that_keeps_other_bytes_is_data_loss(client: Client, between: Proxy, image: Image) -> None:
    async def hook(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PUT" and "/blobs/" in request.path:
            return web.Response(status=201, headers={"Docker-Content-Digest": digest_of(b"other")})
        return None

    between.hook = hook
    await store(client, image, "app")
    with pytest.raises(DataLoss):
        await push(client, f"{between.host}/team/app")


async def test_blob_that_is_damaged_here_is_data_loss_and_moves_no_tag(
    client: Client, registry: Registry, image: Image, node: TestNode
) -> None:
    await store(client, image, "app")
    for digest in (image.layers[0], image.digest):
        path = node.root / "content/blobs/sha256" / digest.partition(":")[2]
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DataLoss, match=digest):
            await push(client, f"{registry.host}/team/app")
        path.write_bytes(whole)
        assert not has(registry, "team/app/manifests/latest")


async def test_range_that_cant_be_is_refused(client: Client, between: Proxy, image: Image) -> None:
    async def hook(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PATCH":
            return web.Response(status=202, headers={"Location": str(request.rel_url), "Range": f"0-{10**17}"})
        return web.Response(status=413) if request.method == "PUT" else None

    between.hook = hook
    await store(client, image, "app")
    with pytest.raises(FailedPrecondition, match="other bytes than it is sent"):
        await push(client, f"{between.host}/team/app")


async def test_rate_limit_is_waited_for_and_told(client: Client, between: Proxy, image: Image) -> None:
    limited = 0

    async def hook(request: web.Request) -> web.StreamResponse | None:
        nonlocal limited
        if request.method == "POST" and not limited:
            limited += 1
            return web.Response(status=429, headers={"Retry-After": "1"})
        return None

    between.hook = hook
    await store(client, image, "app")
    seen: list[content.PushProgress] = []
    request = content.PushImage(name="app", destination=f"{between.host}/team/app")
    await client.operate(content.IMAGE_PUSH, request, on_progress=seen.append)
    assert limited == 1
    assert any("too many requests" in one.waiting for one in seen)


# --------------------------------------------------------------------------------------------------------------- cancel


async def test_cancelled_push_stops_and_takes_its_uploads_back(
    client: Client, between: Proxy, registry: Registry, image: Image, node: TestNode
) -> None:
    reached = asyncio.Event()

    async def hook(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PUT":
            reached.set()
            await asyncio.sleep(60)
        return None

    between.hook = hook
    await store(client, image, "app")
    pushing = asyncio.create_task(push(client, f"{between.host}/team/app"))
    await asyncio.wait_for(reached.wait(), 20)
    assert uploads(registry)
    pushing.cancel()
    await asyncio.gather(pushing, return_exceptions=True)
    for _ in range(200):
        if not uploads(registry):
            break
        await asyncio.sleep(0.05)
    assert uploads(registry) == []
    between.hook = None
    await push(client, f"{between.host}/team/app")


async def test_image_deleted_while_it_is_pushed_is_pushed(client: Client, between: Proxy, image: Image) -> None:
    reached, go = asyncio.Event(), asyncio.Event()

    async def hook(request: web.Request) -> web.StreamResponse | None:
        if request.method == "HEAD":
            reached.set()
            await go.wait()
        return None

    between.hook = hook
    await store(client, image, "app")
    pushing = asyncio.create_task(push(client, f"{between.host}/team/app"))
    await asyncio.wait_for(reached.wait(), 20)
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name="app"))
    go.set()
    assert (await pushing).target.digest == image.digest
