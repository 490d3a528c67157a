"""What of an image is here, what it takes, its names, and what isn't unpacked yet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import AlreadyExists, FailedPrecondition, NotFound

from tests.integration.test_content_archives import blobs, load, save
from tests.support.archives import layout, tar
from tests.support.content_proxy import proxy
from tests.support.images import Image, Layer, digest_of, file, push
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running

NAME, TAG = "registry.example/team/app:v1", "registry.example/team/app:tag"


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content", "snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def platform(architecture: str) -> Image:
    return Image.build([Layer([file("arch", architecture.encode())])], architecture=architecture)


def with_attestation(image: Image) -> tuple[Image, Image]:
    """An index of one platform as BuildKit writes it, and the attestation in it."""
    statement = b'{"_type": "https://in-toto.io/Statement/v0.1"}'
    config = json.dumps({"architecture": "unknown", "os": "unknown", "config": {}, "rootfs": {}}).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": image.media_type,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(config), "size": len(config),
        },
        "layers": [
            {"mediaType": "application/vnd.in-toto+json", "digest": digest_of(statement), "size": len(statement)}
        ],
    }  # fmt: skip
    attestation = Image(
        image.media_type, json.dumps(manifest).encode(),
        {digest_of(config): ("", config), digest_of(statement): ("", statement)},
        config={"architecture": "unknown", "os": "unknown"},
    )  # fmt: skip
    index = Image.index([image, attestation])
    document = json.loads(index.manifest)
    document["manifests"][1]["annotations"] = {
        "vnd.docker.reference.digest": image.digest, "vnd.docker.reference.type": "attestation-manifest",
    }  # fmt: skip
    return Image(index.media_type, json.dumps(document).encode(), platforms=index.platforms), attestation


async def check(client: Client, name: str = NAME) -> content.ImageCheck:
    return await client.call(content.IMAGE_CHECK, content.CheckImage(name=name))


async def usage(client: Client, *names: str) -> content.ImagesUsage:
    return await client.call(content.IMAGE_USAGE, content.ImagesUsageRequest(names=list(names)))


async def test_check_names_what_is_missing_and_where_it_is_unpacked(client: Client, node: TestNode) -> None:
    images = [platform(one) for one in ("amd64", "arm64")]
    index = Image.index(images)
    await load(client, node, tar(layout({NAME: index})))
    found = await check(client)
    assert found.complete
    own, other = found.platforms
    assert (own.complete, own.unpacked, own.missing) == (True, ["overlayfs"], [])
    assert own.total == own.size == len(images[0].manifest) + sum(len(data) for _, data in images[0].blobs.values())
    assert (other.present, other.complete, [one.digest for one in other.missing]) == (False, False, [images[1].digest])
    await client.call(content.BLOB_DELETE, content.BlobRequest(digest=images[0].layers[0]))
    found = await check(client)
    assert not found.complete
    assert [one.digest for one in found.platforms[0].missing] == images[0].layers
    with pytest.raises(NotFound):
        await check(client, "registry.example/nothing:1")


async def test_attestations_come_along_and_are_known_for_what_they_are(
    client: Client, node: TestNode, tmp_path: Path
) -> None:
    index, attestation = with_attestation(platform("amd64"))
    await load(client, node, tar(layout({NAME: index})))
    assert {attestation.digest, *attestation.blobs} < await blobs(client)
    found = await check(client)
    assert [(one.kind, one.complete) for one in found.platforms] == [("image", True), ("attestation", True)]
    saved = await save(client, node, tmp_path / "a.tar", NAME)
    other = client.with_namespace("other")
    assert await load(other, node, saved) == {NAME: index.digest}
    assert await blobs(other) == await blobs(client)


def artifact() -> Image:
    config, chart = b"{}", b"the chart"
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.cncf.helm.config.v1+json",
        "config": {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": digest_of(config), "size": 2},
        "layers": [{
            "mediaType": "application/vnd.cncf.helm.chart.content.v1.tar+gzip", "digest": digest_of(chart),
            "size": len(chart), "annotations": {"org.opencontainers.image.title": "chart.tgz"},
        }],
    }  # fmt: skip
    blobs = {digest_of(config): ("", config), digest_of(chart): ("", chart)}
    return Image(str(manifest["mediaType"]), json.dumps(manifest).encode(), blobs)


async def test_artifacts_are_kept_and_not_unpacked(client: Client, node: TestNode, tmp_path: Path) -> None:
    one = artifact()
    assert await load(client, node, tar(layout({NAME: one}))) == {NAME: one.digest}
    (found,) = (await check(client)).platforms
    assert (found.kind, found.complete, found.unpacked) == ("artifact", True, [])
    with pytest.raises(FailedPrecondition, match="no files to unpack"):
        await client.operate(content.IMAGE_UNPACK, content.UnpackImage(name=NAME))
    saved = await save(client, node, tmp_path / "a.tar", NAME)
    assert await load(client.with_namespace("other"), node, saved) == {NAME: one.digest}


async def test_layers_that_mustnt_be_distributed_may_be_left_out(
    client: Client, node: TestNode, tmp_path: Path
) -> None:
    one = platform("amd64")
    manifest = json.loads(one.manifest)
    foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
    manifest["layers"][0] |= {"mediaType": foreign, "urls": ["https://elsewhere.example/layer"]}
    foreign_image = Image(one.media_type, json.dumps(manifest).encode(), one.blobs)
    await load(client, node, tar(layout({NAME: foreign_image})))
    (found,) = (await check(client)).platforms
    assert found.unpacked == ["overlayfs"]
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=NAME))
    assert resolved.layers[0].urls == ["https://elsewhere.example/layer"]
    whole = await save(client, node, tmp_path / "whole.tar", NAME)
    less = await save(client, node, tmp_path / "less.tar", NAME, skip_non_distributable=True)
    assert one.layers[0].encode()[7:] in whole.read_bytes()
    assert f"blobs/sha256/{one.layers[0][7:]}".encode() not in less.read_bytes()


async def test_usage_counts_what_images_share_once(client: Client, node: TestNode) -> None:
    shared = Layer([file("shared", b"s" * 50_000)], "none")
    one = Image.build([shared, Layer([file("one", b"1" * 5000)], "none")])
    two = Image.build([shared, Layer([file("two", b"2" * 9000)], "none")])
    await load(client, node, tar(layout({NAME: one, TAG: two})))
    found = await usage(client)
    first, second = (next(entry for entry in found.images if entry.name == name) for name in (NAME, TAG))
    layer = len(shared.tar())
    assert first.size - first.unique == second.size - second.unique == layer
    assert found.size == first.size + second.size - layer
    assert (first.snapshots[0].snapshots, found.snapshots[0].snapshots) == (2, 3)
    alone = await usage(client, NAME)
    assert (alone.size, alone.blobs, alone.images) == (first.size, 4, [first])
    every = await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())
    assert len(every) == 3
    with pytest.raises(NotFound):
        await usage(client, "registry.example/nothing:1")


async def test_tag_is_a_name_of_its_own(client: Client, node: TestNode) -> None:
    one, other = platform("amd64"), Image.build([Layer([file("other")])])
    await load(client, node, tar(layout({NAME: one, "registry.example/other:1": other})))

    async def tag(**options: Any) -> content.Image:
        return await client.call(content.IMAGE_TAG, content.TagImage(source=NAME, name=TAG, **options))

    assert (await tag()).target.digest == one.digest
    assert (await tag()).target.digest == one.digest
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=NAME))
    (found,) = (await check(client, TAG)).platforms
    assert (found.complete, found.unpacked) == (True, ["overlayfs"])
    with pytest.raises(NotFound):
        await tag()
    moved = content.TagImage(source="registry.example/other:1", name=TAG)
    with pytest.raises(AlreadyExists):
        await client.call(content.IMAGE_TAG, moved)
    image = await client.call(content.IMAGE_TAG, moved.model_copy(update={"force": True}))
    assert image.target.digest == other.digest
    assert one.digest not in await blobs(client)
    assert len(await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())) == 1


async def test_image_that_was_only_stored_is_unpacked_later(client: Client, node: TestNode) -> None:
    one = platform("amd64")
    await load(client, node, tar(layout({NAME: one})), snapshotter="")
    assert await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()) == []
    unpacked = await client.operate(content.IMAGE_UNPACK, content.UnpackImage(name=NAME))
    assert unpacked.chain_id == one.diff_ids[0]
    assert (await check(client)).platforms[0].unpacked == ["overlayfs"]
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=NAME))
    assert await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()) == []


# ----------------------------------------------------------------------------------------- what pulls bring of images


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


async def test_pull_of_all_platforms_fetches_all_and_unpacks_the_nodes_own(
    client: Client, node: TestNode, registry: Registry
) -> None:
    index, attestation = with_attestation(platform("amd64"))
    both = Image.index([*index.platforms, platform("s390x")])
    name = push(both, registry.host, "multi")
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
    assert attestation.digest not in await blobs(client)
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name, all_platforms=True))
    found = await check(client, name)
    assert found.complete
    assert [(one.kind, one.complete, one.unpacked) for one in found.platforms] == [
        ("image", True, ["overlayfs"]), ("attestation", True, []), ("image", True, []),
    ]  # fmt: skip
    assert len(await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())) == 1
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert await blobs(client) == set()


async def test_pull_of_all_platforms_needs_none_of_the_nodes_own(
    client: Client, node: TestNode, registry: Registry
) -> None:
    name = push(Image.index([platform("s390x"), platform("arm64")]), registry.host, "other")
    with pytest.raises(NotFound, match="arm64"):
        await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
    assert await blobs(client) == set()
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name, all_platforms=True))
    assert [one.complete for one in (await check(client, name)).platforms] == [True, True]
    assert await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()) == []


async def test_progress_shows_what_is_fetched_for_other_platforms(
    client: Client, node: TestNode, registry: Registry
) -> None:
    shared = Layer([file("of-both", b"x" * 9999)])
    both = [Image.build([shared, Layer([file(one)])], architecture=one) for one in ("amd64", "s390x")]
    name = push(Image.index(both), registry.host, "shown")
    told: list[content.PullProgress] = []
    last = both[1].layers[1]

    async def held(request: web.Request) -> web.StreamResponse | None:
        if request.path.endswith(last):
            async with asyncio.timeout(20):
                while not any(len(one.layers) == 3 for one in told):
                    await asyncio.sleep(0.01)
        return None

    async with proxy(registry.host) as between:
        between.hook = held
        request = content.PullImage(name=name.replace(registry.host, between.host), all_platforms=True)
        await client.operate(content.IMAGE_PULL, request, on_progress=told.append)
    most = next(one for one in told if len(one.layers) == 3)
    assert [one.digest for one in most.layers] == [*both[0].layers, last], "a shared layer is one"
    assert [one.state for one in most.layers[:2]] == ["done", "done"]
    assert most.layers[2].state in ("waiting", "downloading")
    assert most.bytes_total == sum(one.size for one in most.layers)
    assert (most.state, most.bytes_done) == ("fetching", most.bytes_total - most.layers[2].size)


async def test_artifact_is_pulled_and_not_unpacked(client: Client, node: TestNode, registry: Registry) -> None:
    one = artifact()
    name = push(one, registry.host, "chart")
    pulled = await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
    assert pulled.target.digest == one.digest
    assert await blobs(client) == {one.digest, *one.blobs}
    assert (await check(client, name)).platforms[0].kind == "artifact"
