"""Transfers over streams, as containerd 2's clients ask for them: pull, push, import, export, tag."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from aiohttp import web
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from shoal_bus.api import content, snapshot
from shoal_bus.api.content import ARCHIVES
from shoal_bus.client import Client
from shoal_bus.connection import connect
from shoal_bus.errors import NotFound
from shoal_gateway.proto.containerd.services.streaming.v1.streaming_pb2 import StreamInit
from shoal_gateway.proto.containerd.services.transfer.v1.transfer_pb2 import TransferRequest
from shoal_gateway.proto.containerd.types.platform_pb2 import Platform
from shoal_gateway.proto.containerd.types.transfer.imagestore_pb2 import (
    ImageReference,
    ImageStore,
    UnpackConfiguration,
)
from shoal_gateway.proto.containerd.types.transfer.importexport_pb2 import ImageExportStream, ImageImportStream
from shoal_gateway.proto.containerd.types.transfer.registry_pb2 import (
    BOTH,
    CREDENTIALS,
    DISABLED,
    HEADER,
    AuthRequest,
    AuthResponse,
    OCIRegistry,
    RegistryResolver,
)
from shoal_gateway.proto.containerd.types.transfer.streaming_pb2 import Data

from tests.support.archives import layout, tar
from tests.support.content_proxy import Hook, proxy
from tests.support.gateway import refusal, socket_of, until
from tests.support.images import Image, Layer, directory, file, push
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running
from tests.support.transfer_client import STREAM, TRANSFER, TransferClient, packed

AMD64, ARM64 = Platform(os="linux", architecture="amd64"), Platform(os="linux", architecture="arm64", variant="v8")
SECRET = "s3cr3t-pa55"
SECRET_BCRYPT = "$2b$04$eqZkAqAwF8FPtc1AEyw2reJcSe5K/N431Xb/WSveuwQtSO1gPRi4m"


def image(word: str, architecture: str = "amd64", variant: str = "") -> Image:
    layers = [
        Layer([directory("etc"), file("etc/motd", word.encode() * 40_000)], "gzip"),
        Layer([file("etc/big", b"".join(n.to_bytes(4, "big") for n in range(120_000)))], "none"),
    ]
    return Image.build(layers, architecture=architecture, variant=variant)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One that lets in `me` alone."""
    place = tmp_path_factory.mktemp("private")
    users = place / "htpasswd"
    users.write_text(f"me:{SECRET_BCRYPT}\n")
    with running(place / "registry", htpasswd=users) as started:
        yield started


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("n")
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("content", "snapshot")
        made.start("gateway", arguments=("--snapshotter", "native"))
        yield made


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as opened:
        yield opened


@pytest.fixture
def client(channel: grpc.aio.Channel, request: pytest.FixtureRequest) -> TransferClient:
    """In a namespace of the test's own."""
    return TransferClient(channel, _namespace(request))


@pytest.fixture
async def bus(node: TestNode, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    connection = await connect(node.natsd.address, name="test")
    yield Client(connection, node.name, _namespace(request))
    await connection.close()


def _namespace(request: pytest.FixtureRequest) -> str:
    return f"n{abs(hash(request.node.name)):x}"


async def images(bus: Client) -> dict[str, str]:
    return {one.name: one.target.digest for one in await bus.collect(content.IMAGE_LIST, content.ListImages())}


async def unpacked(bus: Client, snapshotter: str) -> int:
    every = await bus.collect(snapshot.SNAPSHOT_LIST.on(snapshotter), snapshot.ListSnapshots())
    return sum(one.kind == "committed" for one in every)


async def refused(client: TransferClient, source: Message, destination: Message, progress: str = "") -> str:
    request = TransferRequest(source=packed(source), destination=packed(destination))
    request.options.progress_stream = progress
    return (await refusal(client.channel, TRANSFER, request, metadata=client.metadata, timeout=30))[0]


# ----------------------------------------------------------------------------------------------------- registries


async def test_a_pull_stores_unpacks_and_tells_how_far_it_is(
    client: TransferClient, bus: Client, registry: Registry
) -> None:
    built = image("pulled")
    reference = push(built, registry.host, "team/app", "v1")
    target = ImageStore(
        name=reference, labels={"mine": "yes"}, platforms=[AMD64], unpacks=[UnpackConfiguration(platform=AMD64)]
    )
    told = await client.told(OCIRegistry(reference=reference), target)
    assert await images(bus) == {reference: built.digest}
    found = await bus.call(content.IMAGE_GET, content.ImageRequest(name=reference))
    assert found.labels["mine"] == "yes"
    assert (await unpacked(bus, "native"), await unpacked(bus, "overlayfs")) == (2, 0)
    events = [one.event for one in told]
    assert events[0] == f"Resolving from OCI Registry ({reference})"
    assert events[-1] == f"Completed pull from OCI Registry ({reference})"
    saved = next(one for one in told if one.event == "saved")
    assert (saved.name, saved.desc.digest) == (reference, built.digest)
    layers = [one for one in told if one.name.startswith("layer-")]
    assert {one.name.removeprefix("layer-") for one in layers} == set(built.layers)
    assert {tuple(one.parents) for one in layers} == {(reference,)}
    last = {one.name: one for one in layers}
    assert {one.event for one in last.values()} == {"extracted"}
    assert all(one.progress == one.total > 0 for one in last.values())
    again = await client.told(OCIRegistry(reference=reference), target)
    ended = {one.name: one.event for one in again if one.name.startswith("layer-")}
    assert set(ended) == set(last)
    assert set(ended.values()) <= {"already exists", "extracted"}


async def test_a_pull_by_another_name_and_with_further_ones(
    client: TransferClient, bus: Client, registry: Registry
) -> None:
    built = image("named")
    reference = push(built, registry.host, "team/named", "v1")
    target = ImageStore(
        name="my own name", platforms=[AMD64],
        extra_references=[
            ImageReference(name="further"), ImageReference(name="by-digest", is_prefix=True, add_digest=True),
            ImageReference(name="nothing", is_prefix=True),
        ],
    )  # fmt: skip
    await client.transfer(OCIRegistry(reference=reference), target)
    names = {"my own name", "further", f"by-digest@{built.digest}"}
    assert await images(bus) == dict.fromkeys(names, built.digest)
    further = await bus.call(content.IMAGE_GET, content.ImageRequest(name="further"))
    assert further.labels["containerd.io/gc.bref.image"] == "my own name"
    assert await unpacked(bus, "native") == 0


async def test_platforms_of_an_index(client: TransferClient, bus: Client, registry: Registry) -> None:
    here, there = image("x86"), image("arm", "arm64", "v8")
    reference = push(Image.index([here, there]), registry.host, "team/index", "v1")

    async def blobs() -> set[str]:
        return {one.digest for one in await bus.collect(content.BLOB_LIST, content.ListBlobs())}

    source = OCIRegistry(reference=reference)
    await client.transfer(source, ImageStore(name=reference, platforms=[ARM64]))
    assert set(there.layers) <= await blobs()
    assert not set(here.layers) <= await blobs()
    unpacks = [UnpackConfiguration(platform=AMD64, snapshotter="overlayfs")]
    await client.transfer(source, ImageStore(name=reference, unpacks=unpacks))
    assert {*here.layers, *there.layers} <= await blobs()
    assert await unpacked(bus, "overlayfs") == 2
    several = [UnpackConfiguration(platform=AMD64, snapshotter=name) for name in ("overlayfs", "native")]
    await client.transfer(source, ImageStore(name=reference, platforms=[AMD64], unpacks=several))
    assert await unpacked(bus, "native") == 2


async def test_a_pull_of_several_platforms_and_of_all_that_tells_of_the_others(
    client: TransferClient, bus: Client, registry: Registry
) -> None:
    one, two, three = image("one"), image("two", "arm64", "v8"), image("three", "s390x")
    reference = push(Image.index([one, two, three]), registry.host, "team/several", "v1")
    configs = {json.loads(each.manifest)["config"]["digest"] for each in (one, two, three)}

    async def pulled(**target: object) -> set[str]:
        await client.transfer(OCIRegistry(reference=reference), ImageStore(name=reference, **target))  # type: ignore[arg-type]
        return {each.digest for each in await bus.collect(content.BLOB_LIST, content.ListBlobs())}

    some = Platform(os="linux", architecture="riscv64"), ARM64, AMD64
    blobs = await pulled(platforms=some)
    assert {*one.layers, *two.layers} <= blobs
    assert not {three.digest, three.layers[0]} & blobs
    await bus.call(content.IMAGE_DELETE, content.DeleteImage(name=reference, sync=True))
    blobs = await pulled(platforms=[ARM64, AMD64], manifest_limit=1, all_metadata=True)
    assert {*two.layers, one.digest, two.digest, three.digest, *configs} <= blobs
    assert not {one.layers[0], three.layers[0]} & blobs
    source = OCIRegistry(reference=reference)
    assert await refused(client, source, ImageStore(name="x", manifest_limit=1)) == "UNIMPLEMENTED"


async def test_a_push_goes_where_its_destination_says(client: TransferClient, bus: Client, registry: Registry) -> None:
    built = image("pushed")
    reference = push(built, registry.host, "team/source", "v1")
    await client.transfer(OCIRegistry(reference=reference), ImageStore(name="local", platforms=[AMD64]))
    destination = f"{registry.host}/elsewhere/app:v2"
    told = await client.told(ImageStore(name="local"), OCIRegistry(reference=destination))
    assert told[0].event == f"Pushing to OCI Registry ({destination})"
    assert told[-1].event == f"Completed push to OCI Registry ({destination})"
    assert {one.name.removeprefix("layer-") for one in told if one.name.startswith("layer-")} >= set(built.layers)
    await client.transfer(OCIRegistry(reference=destination), ImageStore(name="back", platforms=[AMD64]))
    assert (await images(bus))["back"] == built.digest
    assert await refused(client, ImageStore(name="none"), OCIRegistry(reference=destination)) == "NOT_FOUND"
    assert await refused(client, ImageStore(), OCIRegistry(reference=destination)) == "INVALID_ARGUMENT"


@pytest.mark.parametrize("kind", ["password", "header"])
async def test_who_the_client_is_is_asked_on_its_stream_and_written_down_nowhere(
    node: TestNode, client: TransferClient, bus: Client, registry: Registry, private: Registry, kind: str
) -> None:
    built = image(f"secret by {kind}")
    reference = push(built, registry.host, "team/open", kind)
    await client.transfer(OCIRegistry(reference=reference), ImageStore(name="local", platforms=[AMD64]))
    destination = f"{private.host}/team/app:{kind}"
    if kind == "password":
        answer = AuthResponse(authType=CREDENTIALS, username="me", secret=SECRET)
    else:
        token = base64.b64encode(f"me:{SECRET}".encode()).decode()
        answer = AuthResponse(authType=HEADER, secret=f"Basic {token}")
    asked: list[AuthRequest] = []
    async with client.stream() as auth, client.stream() as again:
        answering = [asyncio.ensure_future(client.answer(one, answer, asked)) for one in (auth, again)]
        remote = OCIRegistry(reference=destination, resolver=RegistryResolver(auth_stream=auth.name))
        await client.transfer(ImageStore(name="local"), remote)
        remote.resolver.auth_stream = again.name
        await client.transfer(remote, ImageStore(name="back", platforms=[AMD64]))
        await asyncio.wait_for(asyncio.gather(*answering), 20)
    assert (await images(bus))["back"] == built.digest
    assert [(one.host, one.reference) for one in asked] == [(private.host, destination)] * 2
    assert await refused(client, OCIRegistry(reference=destination), ImageStore(name="x")) == "UNAUTHENTICATED"
    for path in node.directory.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


async def test_a_client_that_does_not_say_who_it_is_is_refused(client: TransferClient, private: Registry) -> None:
    async with client.stream() as auth:
        remote = OCIRegistry(reference=f"{private.host}/team/app:v1", resolver=RegistryResolver(auth_stream=auth.name))
        refusing = asyncio.ensure_future(refused(client, remote, ImageStore(name="x")))
        await auth.receive()
        await auth.call.done_writing()
        assert await refusing == "UNAUTHENTICATED"
    async with client.stream() as auth:
        remote.resolver.auth_stream = auth.name
        refusing = asyncio.ensure_future(refused(client, remote, ImageStore(name="x")))
        await auth.receive()
        await auth.send(Data(data=b"not an answer"))
        assert await refusing == "INVALID_ARGUMENT"


async def test_a_client_names_the_directory_of_hosts_and_headers_of_its_own(
    node: TestNode, client: TransferClient, bus: Client, registry: Registry, tmp_path: Path
) -> None:
    """Who it is goes to the registry alone, and not to mirrors."""
    built = image("by other hosts")
    push(built, registry.host, "team/hosts", "v1")
    told: dict[str, list[tuple[str | None, str | None]]] = {"mirror": [], "server": []}
    async with proxy(registry.host) as mirror, proxy(registry.host) as server:

        def watch(name: str) -> Hook:
            async def hook(request: web.Request) -> web.StreamResponse | None:
                told[name].append((request.headers.get("X-Team"), request.headers.get("Authorization")))
                return web.Response(status=404) if name == "mirror" and "/blobs/" in request.path else None

            return hook

        mirror.hook, server.hook = watch("mirror"), watch("server")
        (tmp_path / "registry.invalid").mkdir()
        (tmp_path / "registry.invalid" / "hosts.toml").write_text(
            f'server = "http://{server.host}"\n[host."http://{mirror.host}"]\n'
        )
        headers = {"X-Team": "blue", "Authorization": f"Bearer {SECRET}"}
        async with client.stream() as logs:
            shown = asyncio.ensure_future(logs.receive_bytes())
            resolver = RegistryResolver(host_dir=str(tmp_path), headers=headers, http_debug=BOTH, logs_stream=logs.name)
            source = OCIRegistry(reference="registry.invalid/team/hosts:v1", resolver=resolver)
            await client.transfer(source, ImageStore(name="local", platforms=[AMD64]))
            log = await asyncio.wait_for(shown, 20)
    for layer in built.layers:
        assert f"GET /v2/team/hosts/blobs/{layer}?ns=registry.invalid HTTP/1.1\r\n".encode() in log
    assert b"X-Team: blue\r\n" in log
    assert b"Authorization: <redacted>\r\n" in log
    assert b"HTTP/1.1 200 OK\r\n" in log
    assert SECRET.encode() not in log
    source.resolver.logs_stream, source.resolver.http_debug = "", DISABLED
    assert (await images(bus))["local"] == built.digest
    assert set(told["mirror"]) == {("blue", None)}
    assert set(told["server"]) == {("blue", f"Bearer {SECRET}")}
    assert list((node.state / content.REGISTRIES).iterdir()) == []
    for path in node.directory.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    source.resolver.host_dir = str(tmp_path / "none")
    assert await refused(client, source, ImageStore(name="local")) == "UNAVAILABLE"


async def test_a_client_has_a_whole_header_for_its_credential(
    client: TransferClient, bus: Client, registry: Registry
) -> None:
    built = image("by a header")
    push(built, registry.host, "team/header", "v1")
    async with proxy(registry.host) as between, client.stream() as auth:
        answer, asked = AuthResponse(authType=HEADER, secret=f"Bearer {SECRET}"), list[AuthRequest]()
        answering = asyncio.ensure_future(client.answer(auth, answer, asked))
        source = OCIRegistry(
            reference=f"{between.host}/team/header:v1", resolver=RegistryResolver(auth_stream=auth.name)
        )
        await client.transfer(source, ImageStore(name="local", platforms=[AMD64]))
        await asyncio.wait_for(answering, 20)
    assert (await images(bus))["local"] == built.digest
    assert {one.authorization for one in between.seen} == {f"Bearer {SECRET}"}


async def test_a_scheme_that_a_client_wants_counts_on_loopback_too(client: TransferClient, registry: Registry) -> None:
    reference = push(image("by scheme"), registry.host, "team/scheme", "v1")
    for scheme, code in (("https", "UNAVAILABLE"), ("http", "")):
        source = OCIRegistry(reference=reference, resolver=RegistryResolver(default_scheme=scheme))
        target = ImageStore(name="local", platforms=[AMD64])
        if code:
            assert await refused(client, source, target) == code
        else:
            await client.transfer(source, target)


# ------------------------------------------------------------------------------------------------------- archives


async def test_an_import_by_a_prefix_and_an_export_of_what_came(
    node: TestNode, client: TransferClient, bus: Client
) -> None:
    built, other = image("imported"), image("other")
    archive = tar(layout({"v1": built, "registry.example/other:v3": other}))
    target = ImageStore(
        platforms=[AMD64], unpacks=[UnpackConfiguration(platform=AMD64)],
        extra_references=[ImageReference(name="registry.example/base", is_prefix=True, allow_overwrite=True)],
    )  # fmt: skip
    async with client.stream() as stream, client.stream() as progress:
        sending = asyncio.ensure_future(stream.send_bytes(archive))
        await client.transfer(ImageImportStream(stream=stream.name), target, progress=progress.name)
        await asyncio.wait_for(sending, 20)
        told = await client._collect(progress)
    names = {"registry.example/base:v1": built.digest, "registry.example/other:v3": other.digest}
    assert await images(bus) == names
    assert [one.event for one in told] == ["Importing", "saved", "saved", "Completed import"]
    assert {one.name for one in told if one.event == "saved"} == set(names)
    assert await unpacked(bus, "native") == 4

    source = ImageStore(
        name="registry.example/base:v1", extra_references=[ImageReference(name="registry.example/other:v3")]
    )
    async with client.stream() as stream:
        receiving = asyncio.ensure_future(stream.receive_bytes())
        await client.transfer(source, ImageExportStream(stream=stream.name))
        exported = await asyncio.wait_for(receiving, 20)
    with tarfile.open(fileobj=io.BytesIO(exported)) as opened:
        members = {one.name for one in opened}
        index = json.load(opened.extractfile("index.json"))  # type: ignore[arg-type]
    assert {f"blobs/{digest.replace(':', '/')}" for digest in (*built.layers, *other.layers)} <= members
    assert {one["digest"] for one in index["manifests"]} == set(names.values())
    assert list((node.state / ARCHIVES).iterdir()) == []


async def test_an_archive_that_breaks_off_leaves_nothing(node: TestNode, client: TransferClient, bus: Client) -> None:
    archive = tar(layout({"registry.example/a:v1": image("broken off")}))
    async with client.stream() as stream:
        refusing = asyncio.ensure_future(refused(client, ImageImportStream(stream=stream.name), ImageStore()))
        await stream.receive()
        await stream.send(Data(data=archive[:20_000]))
        await asyncio.sleep(0.3)
    assert await refusing == "CANCELLED"
    async with client.stream() as stream:
        sending = asyncio.ensure_future(stream.send_bytes(archive[:20_000]))
        code = await refused(client, ImageImportStream(stream=stream.name), ImageStore())
        await sending
    assert code in ("DATA_LOSS", "INVALID_ARGUMENT", "FAILED_PRECONDITION")
    assert await images(bus) == {}
    await until(lambda: not list((node.state / ARCHIVES).iterdir()))


async def test_a_client_that_takes_no_more_of_an_export_ends_it(
    node: TestNode, client: TransferClient, bus: Client, registry: Registry
) -> None:
    reference = push(image("half taken"), registry.host, "team/half", "v1")
    await client.transfer(OCIRegistry(reference=reference), ImageStore(name="local", platforms=[AMD64]))
    gateway = psutil.Process(node.of("gateway").pid)
    async with client.stream() as stream:
        refusing = asyncio.ensure_future(
            refused(client, ImageStore(name="local"), ImageExportStream(stream=stream.name))
        )
        await asyncio.sleep(0.5)  # it has no window, and waits
        assert not refusing.done()
    assert await refusing == "CANCELLED"
    assert list((node.state / ARCHIVES).iterdir()) == []
    fds = gateway.num_fds()
    for _ in range(5):
        async with client.stream() as stream:
            call = client.channel.unary_unary(TRANSFER)(
                TransferRequest(
                    source=packed(ImageStore(name="local")), destination=packed(ImageExportStream(stream=stream.name))
                ).SerializeToString(),
                metadata=client.metadata,
            )
            await asyncio.sleep(0.1)
            call.cancel()
    await until(lambda: gateway.num_fds() <= fds)
    await until(lambda: not list((node.state / ARCHIVES).iterdir()))


async def test_bytes_from_stream_to_stream(client: TransferClient) -> None:
    data = bytes(range(256)) * 2000
    async with client.stream() as source, client.stream() as target:
        sending = asyncio.ensure_future(source.send_bytes(data))
        receiving = asyncio.ensure_future(target.receive_bytes())
        await client.transfer(ImageImportStream(stream=source.name), ImageExportStream(stream=target.name))
        assert await asyncio.wait_for(receiving, 20) == data
        await sending


# ------------------------------------------------------------------------------------------------------------ names


async def test_a_tag_makes_a_name_and_moves_one(client: TransferClient, bus: Client, registry: Registry) -> None:
    first, second = image("first"), image("second")
    for name, one in (("first", first), ("second", second)):
        reference = push(one, registry.host, "team/tags", name)
        await client.transfer(OCIRegistry(reference=reference), ImageStore(name=name, platforms=[AMD64]))
    await client.transfer(ImageStore(name="first"), ImageStore(name="tagged", labels={"a": "b"}))
    assert (await images(bus))["tagged"] == first.digest
    await client.transfer(ImageStore(name="second"), ImageStore(name="tagged"))
    assert (await images(bus))["tagged"] == second.digest
    assert await refused(client, ImageStore(name="none"), ImageStore(name="x")) == "NOT_FOUND"
    assert await refused(client, ImageStore(name="first"), ImageStore()) == "INVALID_ARGUMENT"


async def test_a_pull_that_is_cancelled_leaves_nothing(client: TransferClient, bus: Client, registry: Registry) -> None:
    layers = [Layer([file("big", (b"%d" % number) * 3_000_000)], "none") for number in range(8)]
    reference = push(Image.build(layers), registry.host, "team/slow", "v1")
    call = client.channel.unary_unary(TRANSFER)(
        TransferRequest(
            source=packed(OCIRegistry(reference=reference)), destination=packed(ImageStore(name="slow"))
        ).SerializeToString(),
        metadata=client.metadata,
    )
    await asyncio.sleep(0.05)
    call.cancel()
    await asyncio.sleep(1)
    assert await images(bus) == {}
    with pytest.raises(NotFound):
        await bus.call(content.IMAGE_GET, content.ImageRequest(name="slow"))


async def test_what_can_not_be_transferred_has_its_code(client: TransferClient, registry: Registry) -> None:
    remote, local = OCIRegistry(reference=f"{registry.host}/none:v1"), ImageStore(name="x")
    assert await refused(client, remote, remote) == "UNIMPLEMENTED"
    assert await refused(client, remote, ImageExportStream(stream="s")) == "UNIMPLEMENTED"
    assert await refused(client, StreamInit(id="x"), local) == "UNIMPLEMENTED"
    assert await refused(client, remote, local) == "NOT_FOUND"
    assert await refused(client, OCIRegistry(reference="Not/A/Reference:"), local) == "INVALID_ARGUMENT"
    assert await refused(client, OCIRegistry(), local) == "INVALID_ARGUMENT"
    assert await refused(client, remote, local, progress="not-open") == "NOT_FOUND"
    for resolver in (RegistryResolver(auth_stream="not-open"),):
        assert await refused(client, OCIRegistry(reference=remote.reference, resolver=resolver), local) == "NOT_FOUND"
    for resolver, code in (
        (RegistryResolver(host_dir="etc"), "INVALID_ARGUMENT"),
        (RegistryResolver(headers={"Range": "bytes=0-"}), "INVALID_ARGUMENT"),
        (RegistryResolver(headers={"X": "a\nb"}), "INVALID_ARGUMENT"),
        (RegistryResolver(default_scheme="ftp"), "UNIMPLEMENTED"),
    ):
        assert await refused(client, OCIRegistry(reference=remote.reference, resolver=resolver), local) == code
    assert await refused(client, ImageImportStream(stream="not-open"), ImageStore()) == "NOT_FOUND"
    for name in ("nosuch", "no.such/*"):
        unpacks = [UnpackConfiguration(platform=AMD64, snapshotter=name)]
        assert await refused(client, remote, ImageStore(name="x", unpacks=unpacks)) == "INVALID_ARGUMENT"
    request = TransferRequest(source=Any(type_url=OCIRegistry.DESCRIPTOR.full_name, value=b"\xff"))
    assert (await refusal(client.channel, TRANSFER, request, metadata=client.metadata))[0] == "INVALID_ARGUMENT"
    assert (await refusal(client.channel, TRANSFER, TransferRequest(), metadata=client.metadata))[0] == "UNIMPLEMENTED"
    assert (await refusal(client.channel, TRANSFER, TransferRequest()))[0] == "FAILED_PRECONDITION"


# ---------------------------------------------------------------------------------------------------------- streams


async def test_a_stream_has_its_name_alone_while_it_is_open(client: TransferClient, channel: grpc.aio.Channel) -> None:
    async def opening(first: Message, metadata: object) -> str:
        call = channel.stream_stream(STREAM, request_serializer=Any.SerializeToString)(metadata=metadata)  # type: ignore[arg-type]
        await call.write(packed(first))
        await call.done_writing()
        return (await call.code()).name

    async with client.stream("mine"):
        assert await opening(StreamInit(id="mine"), client.metadata) == "ALREADY_EXISTS"
        async with TransferClient(channel, "elsewhere").stream("mine"):
            pass
    await asyncio.sleep(0.05)  # nobody is told when a call that is given up is undone
    async with client.stream("mine"):
        pass
    assert await opening(StreamInit(), client.metadata) == "INVALID_ARGUMENT"
    assert await opening(Data(data=b"x"), client.metadata) == "INVALID_ARGUMENT"
    assert await opening(StreamInit(id="mine"), ()) == "FAILED_PRECONDITION"
    empty = channel.stream_stream(STREAM, request_serializer=Any.SerializeToString)(metadata=client.metadata)
    await empty.done_writing()
    assert (await empty.code()).name == "INVALID_ARGUMENT"


def test_nothing_failed_unexpectedly(node: TestNode) -> None:
    for service in node.services:
        assert "Traceback" not in Path(service.log).read_text(), service.name
