"""Images converted: other compression, other media types, the same files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound

from tests.integration.test_content_archives import blobs, leftovers, load, save, skopeo
from tests.support.archives import blob, layout, tar
from tests.support.images import Flavour, Image, Layer, digest_of, directory, file
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

NAME, MADE = "registry.example/team/app:v1", "registry.example/team/app:converted"


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content", "snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def image(flavour: Flavour = "oci", **options: Any) -> Image:
    layers = [
        Layer([directory("etc"), file("etc/motd", b"hello" * 1000)], "gzip"),
        Layer([file("etc/more", bytes(range(256)) * 2000)], "none" if flavour == "docker" else "zstd"),
        Layer([file("etc/last", b"last")], "none"),
    ]
    return Image.build(layers, flavour=flavour, **options)


async def convert(client: Client, **options: Any) -> content.Image:
    request = content.ConvertImage(source=NAME, name=MADE, **options)
    return await client.operate(content.IMAGE_CONVERT, request, timeout=60)


async def bytes_of(client: Client, digest: str) -> bytes:
    chunks = await client.collect(content.BLOB_READ, content.ReadBlob(digest=digest))
    return b"".join(chunk.data for chunk in chunks)


def plain(data: bytes, media_type: str) -> bytes:
    if media_type.endswith("gzip"):
        return gzip.decompress(data)
    if media_type.endswith("zstd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
async def test_converted_layers_hold_the_same_bytes_under_the_same_diff_ids(
    client: Client, node: TestNode, compression: str
) -> None:
    one = image()
    await load(client, node, tar(layout({NAME: one})))
    made = await convert(client, compression=compression)
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=MADE))
    assert resolved.diff_ids == one.diff_ids
    for layer, diff_id in zip(resolved.layers, resolved.diff_ids, strict=True):
        assert layer.media_type.endswith("tar" if compression == "none" else f"tar+{compression}")
        data = await bytes_of(client, layer.digest)
        assert (len(data), digest_of(data)) == (layer.size, layer.digest)
        assert digest_of(plain(data, layer.media_type)) == diff_id
        if layer.digest not in one.blobs:
            info = await client.call(content.BLOB_INFO, content.BlobRequest(digest=layer.digest))
            assert info.labels["containerd.io/uncompressed"] == diff_id
    again = await convert(client, compression=compression)
    assert again.target == made.target
    assert leftovers(node) == []
    # Snapshots are by diff IDs: what is unpacked is both images'.
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=NAME))
    assert await client.call(snapshot.SNAPSHOT_STAT, snapshot.SnapshotRequest(key=resolved.chain_id))
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=MADE))
    assert await blobs(client) == set()
    assert await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()) == []


async def test_dockers_media_types_become_ocis(client: Client, node: TestNode, tmp_path: Path) -> None:
    one = image("docker")
    await load(client, node, tar(layout({NAME: one})))
    with pytest.raises(FailedPrecondition, match="zstd") as raised:
        await convert(client, compression="zstd")
    assert "--oci" in raised.value.hint
    assert leftovers(node) == []
    made = await convert(client, compression="zstd", oci=True)
    assert made.target.media_type == "application/vnd.oci.image.manifest.v1+json"
    document = json.loads(await bytes_of(client, made.target.digest))
    assert document["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert {layer["mediaType"] for layer in document["layers"]} == {"application/vnd.oci.image.layer.v1.tar+zstd"}
    assert document["config"]["digest"] == json.loads(one.manifest)["config"]["digest"]
    plain_oci = await convert(client, oci=True)
    document = json.loads(await bytes_of(client, plain_oci.target.digest))
    assert [layer["digest"] for layer in document["layers"]] == one.layers
    saved = await save(client, node, tmp_path / "a.tar", MADE)
    skopeo("copy", f"oci-archive:{saved}", f"dir:{tmp_path / 'copied'}")


async def test_of_an_index_one_platform_is_converted_or_all(client: Client, node: TestNode) -> None:
    platforms = [
        Image.build([Layer([file("arch", one.encode() * 999)], "none")], architecture=one)
        for one in ("arm64", "amd64", "s390x")
    ]
    await load(client, node, tar(layout({NAME: Image.index(platforms)})), all_platforms=True)
    alone = await convert(client, compression="gzip", platform="linux/arm64", snapshotter="")
    document = json.loads(await bytes_of(client, alone.target.digest))
    assert document["layers"][0]["mediaType"].endswith("+gzip")
    every = await convert(client, compression="gzip", all_platforms=True)
    document = json.loads(await bytes_of(client, every.target.digest))
    assert [entry["platform"]["architecture"] for entry in document["manifests"]] == ["arm64", "amd64", "s390x"]
    assert document["manifests"][0]["digest"] == alone.target.digest


def attestation(of: Image, *, subject: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    """An attestation of an image as BuildKit makes it: its entry in the index, and its blobs."""
    statement = json.dumps({"predicateType": "https://slsa.dev/provenance/v0.2", "of": of.digest}).encode()
    config = b"{}" if subject else json.dumps({"architecture": "unknown", "os": "unknown"}).encode()
    config_type = "application/vnd.oci.empty.v1+json" if subject else "application/vnd.oci.image.config.v1+json"
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": config_type, "digest": digest_of(config), "size": len(config)},
        "layers": [
            {"mediaType": "application/vnd.in-toto+json", "digest": digest_of(statement), "size": len(statement)}
        ],
    }
    if subject:
        document["artifactType"] = "application/vnd.docker.attestation.manifest.v1+json"
        document["subject"] = {"mediaType": of.media_type, "digest": of.digest, "size": len(of.manifest)}
    data = json.dumps(document).encode()
    entry = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest_of(data), "size": len(data),
        "annotations": {
            "vnd.docker.reference.digest": of.digest, "vnd.docker.reference.type": "attestation-manifest",
        },
        "platform": {"architecture": "unknown", "os": "unknown"},
    }  # fmt: skip
    return entry, {digest_of(one): one for one in (statement, config, data)}


@pytest.mark.parametrize("subject", [False, True], ids=["BuildKit's own", "OCI's subject"])
async def test_attestations_come_along_and_are_about_what_their_image_became(
    client: Client, node: TestNode, tmp_path: Path, subject: bool
) -> None:
    platforms = [
        Image.build([Layer([file("arch", one.encode() * 999)], "none")], architecture=one) for one in ("arm64", "amd64")
    ]
    index = Image.index(platforms)
    document = json.loads(index.manifest)
    more: dict[str, bytes] = {}
    for one in platforms:
        entry, blobs_of = attestation(one, subject=subject)
        document["manifests"].append(entry)
        more |= blobs_of
    whole = Image(index.media_type, json.dumps(document).encode(), platforms=platforms)
    entries = [blob(data, digest) for digest, data in more.items()]
    await load(client, node, tar(layout({NAME: whole}, more=entries)), all_platforms=True)

    made = await convert(client, compression="gzip", all_platforms=True)
    found = json.loads(await bytes_of(client, made.target.digest))["manifests"]
    assert [one["platform"]["architecture"] for one in found] == ["arm64", "amd64", "unknown", "unknown"]
    for image, attests, old in zip(found[:2], found[2:], document["manifests"][2:], strict=True):
        assert attests["annotations"] == {
            "vnd.docker.reference.digest": image["digest"], "vnd.docker.reference.type": "attestation-manifest",
        }  # fmt: skip
        manifest = json.loads(await bytes_of(client, attests["digest"]))
        before = json.loads(await bytes_of(client, old["digest"]))
        if subject:
            assert manifest["subject"]["digest"] == image["digest"]
            assert attests["digest"] != old["digest"]
        else:
            assert attests["digest"] == old["digest"]
        assert manifest["layers"] == before["layers"], "what was said is said"

    alone = await convert(client, compression="gzip", platform="linux/arm64", snapshotter="")
    [image, attests] = json.loads(await bytes_of(client, alone.target.digest))["manifests"]
    assert (image["digest"], attests["digest"]) == (found[0]["digest"], found[2]["digest"])
    await client.call(content.IMAGE_DELETE, content.DeleteImage(name=NAME, sync=True))
    check = await client.call(content.IMAGE_CHECK, content.CheckImage(name=MADE))
    assert [one.kind for one in check.platforms if one.complete] == ["image", "attestation"]
    skopeo(
        "copy", "--all", f"oci-archive:{await save(client, node, tmp_path / 'a.tar', MADE, all_platforms=True)}",
        f"dir:{tmp_path / 'copied'}",
    )  # fmt: skip
    await client.call(content.IMAGE_DELETE, content.DeleteImage(name=MADE, sync=True))
    assert await blobs(client) == set()


async def test_what_cant_be_converted_is_told_and_leaves_nothing(client: Client, node: TestNode) -> None:
    one = image()
    with pytest.raises(NotFound):
        await convert(client, compression="gzip")
    await load(client, node, tar(layout({NAME: one})))
    with pytest.raises(InvalidArgument, match="nothing to convert"):
        await convert(client)
    before = await blobs(client)
    rotten = node.root / "content" / "blobs" / one.layers[0].replace(":", "/")
    data = bytearray(rotten.read_bytes())
    data[-20] ^= 1
    rotten.write_bytes(data)
    with pytest.raises(DataLoss):
        await convert(client, compression="zstd")
    assert await blobs(client) == before
    assert leftovers(node) == []
    assert [one.name for one in await client.collect(content.IMAGE_LIST, content.ListImages())] == [NAME]


async def test_layers_that_arent_what_the_configuration_says_are_refused(client: Client, node: TestNode) -> None:
    one = image()
    config = dict(one.config)
    config["rootfs"] = {"type": "layers", "diff_ids": [one.diff_ids[1], *one.diff_ids[1:]]}
    data = json.dumps(config).encode()
    manifest = json.loads(one.manifest)
    manifest["config"] |= {"digest": digest_of(data), "size": len(data)}
    lying = Image(one.media_type, json.dumps(manifest).encode(), one.blobs | {digest_of(data): ("", data)})
    await load(client, node, tar(layout({NAME: lying})), snapshotter="")
    with pytest.raises(FailedPrecondition, match="diff ID"):
        await convert(client, compression="zstd")
    assert leftovers(node) == []
