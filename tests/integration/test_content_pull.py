"""Pulls from a real registry, on a node with the content service alone, and with the snapshot service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import InvalidArgument, NotFound, Unavailable

from tests.support.images import Image, Layer, busybox_image, directory, file, push, whiteout
from tests.support.natsd import NatsServer, free_port
from tests.support.node import TestNode
from tests.support.registry import Registry, running


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    node.start("content")
    return Client(connection, node.name)


def layered(**options: object) -> Image:
    """Three layers, compressed in three ways, the last of them with a whiteout."""
    layers = [
        Layer([directory("etc"), file("etc/motd", b"hello" * 1000), file("etc/gone")], "gzip"),
        Layer([file("etc/more", bytes(range(256)) * 2000)], "zstd"),
        Layer([whiteout("etc/gone")], "none"),
    ]
    return Image.build(layers, **options)  # type: ignore[arg-type]


def files_of(node: TestNode) -> set[str]:
    """Blobs and ingests on disk."""
    root = node.root / "content"
    return {
        str(path.relative_to(root))
        for part in ("blobs", "ingests")
        for path in (root / part).rglob("*")
        if path.is_file()
    }


async def blobs(client: Client) -> set[str]:
    return {blob.digest for blob in await client.collect(content.BLOB_LIST, content.ListBlobs())}


async def test_pulled_image_is_whole_and_resolves(client: Client, registry: Registry, node: TestNode) -> None:
    image = busybox_image(["echo", "hi"])
    name = push(image, registry.host, "busybox")
    states: set[str] = set()
    pulled = await client.operate(
        content.IMAGE_PULL, content.PullImage(name=name, snapshotter=""), on_progress=lambda p: states.add(p.state)
    )
    assert pulled.name == name
    assert pulled.target.digest == image.digest
    assert await blobs(client) == {image.digest, *image.blobs}
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=name))
    assert resolved.config["config"]["Cmd"] == ["echo", "hi"]
    assert resolved.chain_id == image.diff_ids[0]
    for digest, (_, data) in image.blobs.items():
        chunks = await client.collect(content.BLOB_READ, content.ReadBlob(digest=digest))
        assert b"".join(chunk.data for chunk in chunks) == data
    assert states & {"fetching", "unpacking", "done"}


async def test_layers_are_unpacked_into_a_chain_of_snapshots(
    client: Client, registry: Registry, node: TestNode
) -> None:
    node.start("snapshot")
    name = push(layered(), registry.host, "a/layered", "v1")
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=name))
    found = await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())
    assert {one.kind for one in found} == {"committed"}
    by_key = {one.key: one.parent for one in found}
    chain, key = 0, resolved.chain_id
    while key:
        chain, key = chain + 1, by_key[key]
    assert chain == len(found) == 3
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()) == []
    assert files_of(node) == set()


async def test_platform_is_chosen_from_a_docker_list(client: Client, registry: Registry) -> None:
    images = [busybox_like(architecture, flavour="docker") for architecture in ("arm64", "amd64", "s390x")]
    name = push(Image.index(images, flavour="docker"), registry.host, "multi")
    request = content.PullImage(name=name, platform="linux/s390x", snapshotter="")
    await client.operate(content.IMAGE_PULL, request)
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=name, platform="linux/s390x"))
    assert resolved.platform.architecture == "s390x"
    assert len(await blobs(client)) == 4  # list, manifest, configuration, layer: of one platform alone
    with pytest.raises(NotFound, match="arm64"):
        await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=name, platform="linux/arm64"))
    with pytest.raises(NotFound, match=r"riscv64.*amd64.*arm64.*s390x"):
        await client.operate(content.IMAGE_PULL, content.PullImage(name=name, platform="linux/riscv64", snapshotter=""))


def busybox_like(architecture: str, **options: object) -> Image:
    layer = Layer([file("arch", architecture.encode())])
    return Image.build([layer], architecture=architecture, **options)  # type: ignore[arg-type]


async def test_unknown_image_unreachable_registry_and_bad_names_have_their_codes(
    client: Client, registry: Registry, node: TestNode
) -> None:
    async def pull(name: str, **options: str) -> None:
        await client.operate(content.IMAGE_PULL, content.PullImage(name=name, snapshotter="", **options))  # type: ignore[arg-type]

    with pytest.raises(NotFound, match=registry.host):
        await pull(f"{registry.host}/nothing:here")
    port = free_port()
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port}.*[Rr]efused"):
        await pull(f"127.0.0.1:{port}/x")
    for bad in ("library/UPPER", "a b", "x:@", "x@sha256:1", "-x/y", "a" * 64):
        with pytest.raises(InvalidArgument):
            await pull(bad)
    with pytest.raises(InvalidArgument):
        await pull(f"{registry.host}/x", platform="nonsense/")
    assert files_of(node) == set()
    assert await blobs(client) == set()


async def test_deleting_an_image_keeps_what_another_one_needs(
    client: Client, registry: Registry, node: TestNode
) -> None:
    shared = Layer([file("shared", b"s" * 5000)])
    one = push(Image.build([shared, Layer([file("one")])]), registry.host, "one")
    other_image = Image.build([shared, Layer([file("other")])])
    other = push(other_image, registry.host, "other")
    for name in (one, other):
        await client.operate(content.IMAGE_PULL, content.PullImage(name=name, snapshotter=""))
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=one))
    assert await blobs(client) == {other_image.digest, *other_image.blobs}
    assert len(files_of(node)) == len(other_image.blobs) + 1


async def test_namespaces_share_bytes_and_not_sight(client: Client, registry: Registry, node: TestNode) -> None:
    name = push(layered(), registry.host, "shared")
    other = client.with_namespace("other")
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name, snapshotter=""))
    assert await blobs(other) == set()
    before = files_of(node)
    await other.operate(content.IMAGE_PULL, content.PullImage(name=name, snapshotter=""))
    assert files_of(node) == before
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert await blobs(client) == set()
    assert files_of(node) == before
    await other.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert files_of(node) == set()


async def test_moved_tag_replaces_the_image_and_what_only_it_needed(
    client: Client, registry: Registry, node: TestNode
) -> None:
    name = push(busybox_like("amd64"), registry.host, "moving")
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name, snapshotter=""))
    newer = Image.build([Layer([file("newer", b"n")])])
    push(newer, registry.host, "moving")
    pulled = await client.operate(content.IMAGE_PULL, content.PullImage(name=name, snapshotter=""))
    assert pulled.target.digest == newer.digest
    assert await blobs(client) == {newer.digest, *newer.blobs}
    assert len(files_of(node)) == 3


async def test_concurrent_pulls_of_one_image_by_two_copies_agree(
    client: Client, registry: Registry, node: TestNode
) -> None:
    node.start("content")
    name = push(layered(), registry.host, "popular")
    request = content.PullImage(name=name, snapshotter="")
    clients = [client.with_namespace(f"ns{n % 3}") for n in range(9)]
    pulled = await asyncio.gather(*(one.operate(content.IMAGE_PULL, request) for one in clients))
    assert len({image.target.digest for image in pulled}) == 1
    assert not any("ingests" in path for path in files_of(node))
