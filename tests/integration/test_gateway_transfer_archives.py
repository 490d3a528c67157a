"""Archives on their way through the transfer service: what is stored of one by which names, and what one has in it."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import connect
from shoal_bus.types import Descriptor
from shoal_gateway.proto.containerd.services.transfer.v1.transfer_pb2 import TransferRequest
from shoal_gateway.proto.containerd.types.platform_pb2 import Platform
from shoal_gateway.proto.containerd.types.transfer.imagestore_pb2 import (
    ImageReference,
    ImageStore,
    UnpackConfiguration,
)
from shoal_gateway.proto.containerd.types.transfer.importexport_pb2 import ImageExportStream, ImageImportStream
from shoal_gateway.proto.containerd.types.transfer.progress_pb2 import Progress

from tests.support.archives import blob, docker, layout, tar
from tests.support.gateway import refusal, socket_of
from tests.support.images import Image, Layer, file
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.transfer_client import TRANSFER, TransferClient, packed

AMD64, ARM64 = Platform(os="linux", architecture="amd64"), Platform(os="linux", architecture="arm64")
INDEX, MANIFEST = "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"
CONTAINERD_NAME, REF_NAME = "io.containerd.image.name", "org.opencontainers.image.ref.name"
Names = dict[str, str]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("n")
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("content", "snapshot", "gateway")
        yield made


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as opened:
        yield opened


def _namespace(request: pytest.FixtureRequest) -> str:
    return f"n{abs(hash(request.node.name)):x}"


@pytest.fixture
def client(channel: grpc.aio.Channel, request: pytest.FixtureRequest) -> TransferClient:
    """In a namespace of the test's own."""
    return TransferClient(channel, _namespace(request))


@pytest.fixture
async def bus(node: TestNode, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    connection = await connect(node.natsd.address, name="test")
    yield Client(connection, node.name, _namespace(request))
    await connection.close()


async def stored(client: TransferClient, archive: bytes, target: ImageStore, **source: Any) -> list[Progress]:
    """What is told while an archive is imported."""
    async with client.stream() as stream, client.stream() as progress:
        sending = asyncio.ensure_future(stream.send_bytes(archive))
        await client.transfer(ImageImportStream(stream=stream.name, **source), target, progress=progress.name)
        await asyncio.wait_for(sending, 20)
        return await client._collect(progress)


async def refused(client: TransferClient, archive: bytes, target: ImageStore) -> tuple[str, str]:
    async with client.stream() as stream:
        sending = asyncio.ensure_future(stream.send_bytes(archive))
        request = TransferRequest(source=packed(ImageImportStream(stream=stream.name)), destination=packed(target))
        code, details, *_ = await refusal(client.channel, TRANSFER, request, metadata=client.metadata, timeout=30)
        await asyncio.wait_for(sending, 20)
    return code, details


async def images(bus: Client) -> dict[str, Descriptor]:
    return {one.name: one.target for one in await bus.collect(content.IMAGE_LIST, content.ListImages())}


async def blobs(bus: Client) -> set[str]:
    return {one.digest for one in await bus.collect(content.BLOB_LIST, content.ListBlobs())}


# ----------------------------------------------------------------------------------------------------------- names


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def manifest(word: str) -> tuple[bytes, dict[str, bytes]]:
    """A manifest of a layer that isn't one, with a configuration that doesn't say so; and its blobs."""
    layer = gzip.compress(word.encode() * 10, mtime=0)
    config = json.dumps({"architecture": "amd64", "os": "linux", "author": word}).encode()
    document = {
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(config),
                   "size": len(config)},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest_of(layer),
                    "size": len(layer)}],
    }  # fmt: skip
    return json.dumps(document).encode(), {digest_of(layer): layer, digest_of(config): config}


def annotated(*annotations: Names) -> tuple[bytes, str, list[str]]:
    """An archive whose index has a manifest for each of them; the digests of the index and of the manifests."""
    found: dict[str, bytes] = {}
    entries: list[dict[str, Any]] = []
    for at, names in enumerate(annotations):
        data, more = manifest(f"{at} {names}")
        found |= more | {digest_of(data): data}
        entries.append({"mediaType": MANIFEST, "digest": digest_of(data), "size": len(data), "annotations": names})
    index = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    members = [
        *(blob(data, digest) for digest, data in found.items()),
        file("index.json", index),
        file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
    ]
    return tar(members), digest_of(index), [str(entry["digest"]) for entry in entries]


@dataclass
class Case:
    """`expected` has each image's name and target, in their order: `@…` in a name stands for its own digest."""

    index: str
    annotations: list[Names]
    prefixes: list[ImageReference]
    expected: list[tuple[str, str]] = field(default_factory=list)


def prefix(name: str, *, overwrite: bool = False, digest: bool = False, skip: bool = False) -> ImageReference:
    return ImageReference(
        name=name, is_prefix=True, allow_overwrite=overwrite, add_digest=digest, skip_named_digest=skip
    )


ALL = "registry.test/all"
CASES = {
    "a whole name, whatever the prefix": Case(
        "", [{CONTAINERD_NAME: "registry.test/basic:latest"}], [prefix("unused", overwrite=True)],
        [("registry.test/basic:latest", "0")],
    ),
    "the index alone": Case("registry.test/index:latest", [{}], [], [("registry.test/index:latest", "index")]),
    "the index and what has its prefix": Case(
        f"{ALL}:index",
        [{CONTAINERD_NAME: f"{ALL}:1"}, {CONTAINERD_NAME: f"{ALL}more:1"}, {CONTAINERD_NAME: "other:1"}],
        [prefix(ALL)], [(f"{ALL}:index", "index"), (f"{ALL}:1", "0")],
    ),
    "digests, too": Case(
        f"{ALL}:index", [{CONTAINERD_NAME: f"{ALL}:1"}], [prefix(ALL, digest=True)],
        [(f"{ALL}:index", "index"), (f"{ALL}@…", "index"), (f"{ALL}:1", "0"), (f"{ALL}@…", "0")],
    ),
    "digests where there is no name": Case(
        f"{ALL}:index", [{CONTAINERD_NAME: f"{ALL}:1"}, {}], [prefix(ALL, digest=True, skip=True)],
        [(f"{ALL}:index", "index"), (f"{ALL}@…", "index"), (f"{ALL}:1", "0"), (f"{ALL}@…", "1")],
    ),
    "digests alone": Case(
        "", [{}], [prefix("imported", digest=True, skip=True)], [("imported@…", "index"), ("imported@…", "0")],
    ),
    "digests by another prefix than the name's": Case(
        f"{ALL}:index", [{CONTAINERD_NAME: f"{ALL}:1"}], [prefix("some", overwrite=True, digest=True)],
        [(f"{ALL}:index", "index"), ("some@…", "index"), (f"{ALL}:1", "0"), ("some@…", "0")],
    ),
    "a tag": Case("", [{REF_NAME: "best"}], [prefix("registry.test/my")], [("registry.test/my:best", "0")]),
    "a tag and digests": Case(
        f"{ALL}:index", [{REF_NAME: "latest"}], [prefix("base", overwrite=True, digest=True)],
        [(f"{ALL}:index", "index"), ("base@…", "index"), ("base:latest", "0"), ("base@…", "0")],
    ),
    "a whole name as OCI's annotation": Case(
        "", [{REF_NAME: f"{ALL}/deeper:1"}, {REF_NAME: "other.test/x:1"}], [prefix(ALL)], [(f"{ALL}/deeper:1", "0")],
    ),
    "containerd's annotation counts before OCI's, and is no tag": Case(
        "", [{CONTAINERD_NAME: "tag", REF_NAME: "latest"}, {CONTAINERD_NAME: f"{ALL}:a", REF_NAME: "b"}],
        [prefix(ALL)], [(f"{ALL}:a", "1")],
    ),
    "several prefixes, and a further name of the index": Case(
        "mine", [{REF_NAME: "v1"}], [prefix("a"), ImageReference(name="further"), prefix("b")],
        [("mine", "index"), ("further", "index"), ("a:v1", "0"), ("b:v1", "0")],
    ),
    "one manifest by two names": Case(
        "", [{REF_NAME: "v1"}, {REF_NAME: "v2"}], [prefix("a")], [("a:v1", "0"), ("a:v2", "1")],
    ),
    "nothing that is wanted": Case("", [{REF_NAME: "other.test/x:1"}], [prefix(ALL)], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_what_an_archive_has_is_stored_by_the_names_that_the_store_is_given(
    client: TransferClient, bus: Client, name: str
) -> None:
    case = CASES[name]
    archive, index, manifests = annotated(*case.annotations)
    digests = {"index": index} | {str(at): digest for at, digest in enumerate(manifests)}
    expected = [(told.replace("…", digests[which]), digests[which]) for told, which in case.expected]
    told = await stored(
        client, archive, ImageStore(name=case.index, extra_references=case.prefixes, labels={"mine": "yes"})
    )
    assert [one.event for one in told] == ["Importing", *["saved"] * len(expected), "Completed import"]
    assert [(one.name, one.desc.digest) for one in told if one.event == "saved"] == expected
    found = await images(bus)
    assert {image: target.digest for image, target in found.items()} == dict(expected)
    for image, target in found.items():
        assert target.media_type == (INDEX if target.digest == index else MANIFEST)
        record = await bus.call(content.IMAGE_GET, content.ImageRequest(name=image))
        assert record.labels["mine"] == "yes"
        assert record.labels.get("containerd.io/gc.bref.image", "") == (case.index if image != case.index else "")
    if expected:
        assert set(digests.values()) & await blobs(bus) >= set(dict(expected).values())


# ------------------------------------------------------------------------------------------------------- platforms


def built(word: str, architecture: str = "amd64") -> Image:
    return Image.build(
        [Layer([file("etc/motd", word.encode() * 999)], "none"), Layer([file("b", word.encode())], "gzip")],
        architecture=architecture,
    )


async def test_of_an_index_what_is_for_the_platforms_is_taken(client: TransferClient, bus: Client) -> None:
    here, there = built("here"), built("there", "arm64")
    index = Image.index([here, there])
    archive = tar(layout({"v1": index}))
    base = [prefix("base")]
    await stored(client, archive, ImageStore(extra_references=base, platforms=[AMD64]))
    assert (await images(bus))["base:v1"].digest == index.digest
    assert await blobs(bus) >= {index.digest, here.digest, *here.layers}
    assert not await blobs(bus) & {there.digest, *there.layers}
    await stored(client, archive, ImageStore(extra_references=base, platforms=[AMD64], all_metadata=True))
    config = json.loads(there.manifest)["config"]["digest"]
    assert await blobs(bus) & {there.digest, config, *there.layers} == {there.digest, config}
    limited = ImageStore(extra_references=base, platforms=[ARM64, AMD64], manifest_limit=1)
    await stored(client, archive, limited)
    assert await blobs(bus) >= {there.digest, *there.layers}
    elsewhere = ImageStore(extra_references=base, platforms=[Platform(os="linux", architecture="s390x")])
    assert (await refused(client, tar(layout({"v1": Image.index([here])})), elsewhere))[0] == "NOT_FOUND"
    await stored(client, archive, ImageStore(extra_references=base))
    assert await blobs(bus) >= {here.digest, *here.layers, there.digest, *there.layers}


async def test_an_archive_is_unpacked_where_the_store_says(client: TransferClient, bus: Client) -> None:
    here, there = built("unpacked"), built("other", "arm64")
    unpacks = [UnpackConfiguration(platform=AMD64, snapshotter=name) for name in ("overlayfs", "native")]
    target = ImageStore(name="index", platforms=[AMD64], unpacks=unpacks)
    await stored(client, tar(layout({"v1": Image.index([here, there])})), target)
    for name in ("overlayfs", "native"):
        every = await bus.collect(snapshot.SNAPSHOT_LIST.on(name), snapshot.ListSnapshots())
        assert sum(one.kind == "committed" for one in every) == 2, name


async def test_what_is_missing_is_told_and_nothing_is_left(client: TransferClient, bus: Client) -> None:
    image = built("incomplete")
    archive = tar(layout({"v1": image}, leave_out=[image.layers[1]]))
    code, details = await refused(client, archive, ImageStore(name="index", extra_references=[prefix("a")]))
    assert code == "NOT_FOUND"
    assert image.layers[1] in details
    assert await images(bus) == {}
    assert await blobs(bus) == set()
    unpacks = [UnpackConfiguration(platform=AMD64, snapshotter="nosuch")]
    assert (await refused(client, b"", ImageStore(name="index", unpacks=unpacks)))[0] == "INVALID_ARGUMENT"


async def test_indexes_that_name_one_another_many_times_take_no_time(client: TransferClient, bus: Client) -> None:
    """Followed name by name, they would be 200^6 manifests."""
    image = built("often")
    members: list[tuple[tarfile.TarInfo, bytes]] = [blob(data, digest) for digest, (_, data) in image.blobs.items()]
    media_type, data = image.media_type, image.manifest
    for _ in range(6):
        members.append(blob(data, digest_of(data)))
        entry = {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}
        media_type, data = INDEX, json.dumps({"schemaVersion": 2, "manifests": [entry] * 200}).encode()
    members += [file("index.json", data), file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')]
    unpacks = [UnpackConfiguration(platform=AMD64)]
    await asyncio.wait_for(stored(client, tar(members), ImageStore(name="index", unpacks=unpacks)), 20)
    assert (await images(bus))["index"].digest == digest_of(data)


# ---------------------------------------------------------------------------------------------------------- Docker


async def test_what_docker_saves_has_an_index_made_for_it(client: TransferClient, bus: Client) -> None:
    image = built("docker")
    archive = tar(docker({"team/app:v1": image}))
    target = ImageStore(name="index", extra_references=[prefix("unused", overwrite=True)], platforms=[AMD64])
    await stored(client, archive, target)
    found = await images(bus)
    assert set(found) == {"index", "docker.io/team/app:v1"}
    assert found["index"].media_type == INDEX
    named = found["docker.io/team/app:v1"]
    assert named.annotations == {CONTAINERD_NAME: "docker.io/team/app:v1", REF_NAME: "v1"}
    assert named.platform is not None
    assert named.platform.architecture == "amd64"


async def test_plain_layers_are_compressed_when_that_is_asked_for(client: TransferClient, bus: Client) -> None:
    image = Image.build([Layer([file("a", b"a" * 9999)], "none"), Layer([file("b", b"b" * 9999)], "none")])
    target = ImageStore(
        extra_references=[prefix("unused", overwrite=True)], unpacks=[UnpackConfiguration(platform=AMD64)]
    )
    await stored(client, tar(docker({"team/app:v1": image})), target, force_compress=True)
    resolved = await bus.call(content.IMAGE_RESOLVE, content.ResolveImage(name="docker.io/team/app:v1"))
    assert [one.media_type.rpartition(".")[2] for one in resolved.layers] == ["gzip", "gzip"]
    assert all(one.size < 9999 for one in resolved.layers)
    for layer, diff_id in zip(resolved.layers, image.layers, strict=True):
        info = await bus.call(content.BLOB_INFO, content.BlobRequest(digest=layer.digest))
        assert info.labels["containerd.io/uncompressed"] == diff_id
    every = await bus.collect(snapshot.SNAPSHOT_LIST.on("overlayfs"), snapshot.ListSnapshots())
    assert sum(one.kind == "committed" for one in every) == 2
    oci = built("layout")
    await stored(client, tar(layout({"v1": oci})), ImageStore(extra_references=[prefix("oci")]), force_compress=True)
    assert (await images(bus))["oci:v1"].digest == oci.digest


# --------------------------------------------------------------------------------------------------------- exports


async def exported(client: TransferClient, source: ImageStore, **target: Any) -> dict[str, bytes]:
    """The members of an archive, and the archive itself by no name."""
    async with client.stream() as stream:
        receiving = asyncio.ensure_future(stream.receive_bytes())
        await client.transfer(source, ImageExportStream(stream=stream.name, **target))
        archive = await asyncio.wait_for(receiving, 20)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        found = {one.name: opened.extractfile(one).read() for one in opened if one.isreg()}  # type: ignore[union-attr]
    return found | {"": archive}


def digests(members: dict[str, bytes]) -> set[str]:
    return {f"sha256:{name.removeprefix('blobs/sha256/')}" for name in members if name.startswith("blobs/")}


async def test_an_export_has_what_its_options_say(client: TransferClient, bus: Client, tmp_path: Path) -> None:
    here, there = built("here, out"), built("there, out", "arm64")
    index = Image.index([here, there])
    await stored(client, tar(layout({"v1": index})), ImageStore(extra_references=[prefix("registry.test/out")]))
    source = ImageStore(name="registry.test/out:v1")

    async def taken(**target: Any) -> dict[str, bytes]:
        members = await exported(client, source, **target)
        (entry,) = json.loads(members["index.json"])["manifests"]
        assert entry["digest"] == index.digest, "an index stays what it is"
        assert entry["annotations"] == {CONTAINERD_NAME: "registry.test/out:v1", REF_NAME: "v1"}
        return members

    own, other = {here.digest, *here.layers}, {there.digest, *there.layers}
    members = await taken()
    assert (digests(members) & (own | other), index.digest in digests(members)) == (own, True)
    (docker_manifest,) = json.loads(members["manifest.json"])
    assert docker_manifest["Layers"] == [f"blobs/sha256/{one.partition(':')[2]}" for one in here.layers]
    members = await taken(platforms=[ARM64])
    assert digests(members) & (own | other) == other
    assert json.loads(members["manifest.json"])[0]["Layers"][0].endswith(there.layers[0].partition(":")[2])
    for every in (
        {"platforms": [AMD64, ARM64]},
        {"all_platforms": True},
        {"all_platforms": True, "platforms": [ARM64]},
    ):
        assert digests(await taken(**every)) & (own | other) == own | other
    assert "manifest.json" not in await taken(skip_compatibility_manifest=True)
    request = ImageExportStream(stream="s", platforms=[Platform(os="linux", architecture="s390x")])
    async with client.stream("s"):
        asked = TransferRequest(source=packed(source), destination=packed(request))
        assert (await refusal(client.channel, TRANSFER, asked, metadata=client.metadata, timeout=30))[0] == "NOT_FOUND"

    (tmp_path / "out.tar").write_bytes((await taken(all_platforms=True))[""])
    assert copied(tmp_path, "copy", "--all") == index.digest
    (tmp_path / "out.tar").write_bytes((await taken())[""])
    assert copied(tmp_path, "--override-arch=amd64", "copy") == here.digest


def copied(place: Path, *how: str) -> str:
    """The digest of what skopeo has of an archive."""
    command = ["skopeo", "--insecure-policy", *how, f"oci-archive:{place}/out.tar:v1", f"dir:{place}/copy"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return digest_of((place / "copy" / "manifest.json").read_bytes())


async def test_what_may_not_be_distributed_stays_and_comes_back_without(client: TransferClient, bus: Client) -> None:
    image = built("foreign")
    document = json.loads(image.manifest)
    foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    document["layers"][0] |= {"mediaType": foreign, "urls": ["https://registry.invalid/x"]}
    changed = Image(image.media_type, json.dumps(document).encode(), image.blobs, layers=image.layers)
    await stored(client, tar(layout({"v1": changed})), ImageStore(extra_references=[prefix("out")]))
    members = await exported(client, ImageStore(name="out:v1"), skip_non_distributable=True)
    assert digests(members) & set(image.layers) == {image.layers[1]}
    assert digests(await exported(client, ImageStore(name="out:v1"))) >= set(image.layers)
    elsewhere = TransferClient(client.channel, "elsewhere")
    await stored(elsewhere, members[""], ImageStore(extra_references=[prefix("out", overwrite=True)]))


async def test_an_image_is_exported_whatever_it_is_called_and_made_of(client: TransferClient, bus: Client) -> None:
    archive, _, (manifest_digest,) = annotated({REF_NAME: "v1"})
    await stored(client, archive, ImageStore(extra_references=[prefix("a")]))
    await client.transfer(ImageStore(name="a:v1"), ImageStore(name="my own name"))
    source = ImageStore(name="a:v1", extra_references=[ImageReference(name="my own name")])
    members = await exported(client, source)
    entries = json.loads(members["index.json"])["manifests"]
    assert {one["annotations"][CONTAINERD_NAME]: one["digest"] for one in entries} == {
        "a:v1": manifest_digest, "my own name": manifest_digest,
    }  # fmt: skip


def test_nothing_failed_unexpectedly(node: TestNode) -> None:
    for service in node.services:
        assert "Traceback" not in Path(service.log).read_text(), service.name
