"""Blobs, ingests, image records and namespaces over the bus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument, NotFound, OutOfRange
from shoal_bus.types import Descriptor

from tests.support.natsd import NatsServer
from tests.support.node import TestNode

DATA = bytes(range(256)) * 4000
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    node.start("content")
    return Client(connection, node.name)


async def write(client: Client, data: bytes = DATA, ref: str = "r", **options: object) -> content.IngestStatus:
    """`data` as an ingest of several requests, committed."""
    step = 400_000
    for offset in range(0, len(data), step):
        piece, last = data[offset : offset + step], offset + step >= len(data)
        request = content.WriteIngest(ref=ref, offset=offset, data=piece, commit=last, **(options if last else {}))  # type: ignore[arg-type]
        status = await client.call(content.INGEST_WRITE, request)
    return status


def target(digest: str = DIGEST) -> Descriptor:
    return Descriptor(media_type="application/octet-stream", digest=digest, size=len(DATA))


async def test_written_blob_is_read_back_whole_and_in_ranges(client: Client, node: TestNode) -> None:
    status = await write(client, total=len(DATA), expected=DIGEST, labels={"a": "b"})
    assert status.committed == DIGEST
    info = await client.call(content.BLOB_INFO, content.BlobRequest(digest=DIGEST))
    assert (info.size, info.labels) == (len(DATA), {"a": "b"})
    request = content.ReadBlob(digest=DIGEST, offset=100_000, size=600_000)
    assert b"".join([c.data for c in await client.collect(content.BLOB_READ, request)]) == DATA[100_000:700_000]
    with pytest.raises(OutOfRange):
        await client.collect(content.BLOB_READ, content.ReadBlob(digest=DIGEST, offset=len(DATA) + 1))
    path = node.root / "content" / "blobs" / "sha256" / DIGEST.removeprefix("sha256:")
    assert path.read_bytes() == DATA
    assert (node.root / "content" / "oci-layout").read_text() == '{"imageLayoutVersion": "1.0.0"}'


async def test_ingest_goes_on_after_a_kill_and_refuses_what_does_not_fit(client: Client, node: TestNode) -> None:
    await client.call(content.INGEST_WRITE, content.WriteIngest(ref="r", data=DATA[:1000]))
    node.of("content").kill()
    node.of("content").start()
    status = await client.call(content.INGEST_STATUS, content.IngestRequest(ref="r"))
    assert status.offset == 1000
    with pytest.raises(OutOfRange, match="1000"):
        await client.call(content.INGEST_WRITE, content.WriteIngest(ref="r", offset=10, data=b"x"))
    wrong = content.WriteIngest(ref="r", offset=1000, commit=True, expected=DIGEST)
    with pytest.raises(FailedPrecondition):
        await client.call(content.INGEST_WRITE, wrong)
    rest = content.WriteIngest(ref="r2", offset=5, data=b"x")
    with pytest.raises(OutOfRange):
        await client.call(content.INGEST_WRITE, rest)
    await client.call(content.INGEST_ABORT, content.IngestRequest(ref="r"))
    assert await client.collect(content.INGEST_LIST, content.ListBlobs()) == []
    assert list((node.root / "content" / "ingests").iterdir()) == []


async def test_a_blob_that_is_there_is_not_written_twice(client: Client) -> None:
    await write(client)
    with pytest.raises(AlreadyExists):
        await write(client, ref="again", expected=DIGEST)
    with pytest.raises(AlreadyExists):
        await client.call(content.INGEST_WRITE, content.WriteIngest(ref="now", data=b"", expected=DIGEST))
    other = client.with_namespace("other")
    with pytest.raises(NotFound):
        await other.call(content.BLOB_INFO, content.BlobRequest(digest=DIGEST))
    assert (await write(other)).committed == DIGEST


async def test_claimed_blob_outlives_its_deletion(client: Client) -> None:
    await write(client)
    claim = await client.call(content.BLOB_CLAIM, content.ClaimBlob(digest=DIGEST, ttl_seconds=60))
    await client.call(content.BLOB_DELETE, content.BlobRequest(digest=DIGEST))
    with pytest.raises(NotFound):
        await client.call(content.BLOB_INFO, content.BlobRequest(digest=DIGEST))
    assert Path(claim.path).read_bytes() == DATA


async def test_image_records_are_made_changed_listed_and_removed_with_their_events(
    client: Client, connection: Connection
) -> None:
    await write(client)
    name = "example.com/app:1"
    await client.call(
        content.IMAGE_CREATE, content.CreateImage(name=name, target=target(), labels={"a": "1", "b": "2"})
    )
    with pytest.raises(AlreadyExists):
        await client.call(content.IMAGE_CREATE, content.CreateImage(name=name, target=target()))
    update = content.UpdateImage(name=name, labels={"a": "3"}, fields=["labels.a", "labels.b"])
    assert (await client.call(content.IMAGE_UPDATE, update)).labels == {"a": "3"}
    with pytest.raises(InvalidArgument):
        await client.call(content.IMAGE_UPDATE, content.UpdateImage(name=name, fields=["name"]))
    for filters, found in (["name==" + name], 1), (["labels.a==1"], 0), (["target.digest==" + DIGEST], 1):
        listed = await client.collect(content.IMAGE_LIST, content.ListImages(filters=filters))
        assert len(listed) == found
    with pytest.raises(InvalidArgument):
        await client.collect(content.IMAGE_LIST, content.ListImages(filters=["name=="]))
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    with pytest.raises(NotFound):
        await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []
    topics = await events(connection, 5)
    assert topics == ["/content/create", "/images/create", "/images/update", "/images/delete", "/content/delete"]


async def events(connection: Connection, count: int) -> list[str]:
    topics: list[str] = []
    stream = read_events(connection, start=1)
    async for received in stream:
        topics.append(received.event.topic)
        if len(topics) == count:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return topics


async def test_namespaces_are_implicit_or_made_and_go_only_when_empty(client: Client) -> None:
    await write(client.with_namespace("implicit"))
    await client.call(content.NAMESPACE_CREATE, content.SaveNamespace(name="made", labels={"k": "v"}))
    listed = await client.collect(content.NAMESPACE_LIST, content.ListNamespaces())
    assert [(n.name, n.labels) for n in listed] == [("implicit", {}), ("made", {"k": "v"})]
    with pytest.raises(AlreadyExists):
        await client.call(content.NAMESPACE_CREATE, content.SaveNamespace(name="made"))
    with pytest.raises(FailedPrecondition, match="blobs"):
        await client.call(content.NAMESPACE_DELETE, content.NamespaceRequest(name="implicit"))
    changed = content.SaveNamespace(name="made", labels={"k": ""}, fields=["labels.k"])
    assert (await client.call(content.NAMESPACE_UPDATE, changed)).labels == {}
    await client.call(content.NAMESPACE_DELETE, content.NamespaceRequest(name="made"))
    with pytest.raises(NotFound):
        await client.call(content.NAMESPACE_GET, content.NamespaceRequest(name="made"))


async def test_start_mends_what_is_left_over_or_missing(client: Client, node: TestNode) -> None:
    await write(client, labels={"containerd.io/gc.root": "test"})
    node.of("content").kill()
    root = node.root / "content"
    blob = root / "blobs" / "sha256" / DIGEST.removeprefix("sha256:")
    blob.write_bytes(DATA[:10])
    stray = root / "blobs" / "sha256" / ("0" * 64)
    stray.write_bytes(b"stray")
    (root / "ingests" / "left").write_bytes(b"left")
    node.of("content").start()
    assert not stray.exists()
    assert not blob.exists()
    assert list((root / "ingests").iterdir()) == []
    assert [p.read_bytes() for p in (root / "quarantine").iterdir()] == [DATA[:10]]
    (listed,) = await client.collect(content.BLOB_LIST, content.ListBlobs())
    assert listed.rotten == f"it has 10 bytes instead of {len(DATA)}"
    with pytest.raises(DataLoss, match="10 bytes instead of"):
        await client.collect(content.BLOB_READ, content.ReadBlob(digest=DIGEST))
    assert (await write(client)).committed == DIGEST
    assert blob.read_bytes() == DATA
    (listed,) = await client.collect(content.BLOB_LIST, content.ListBlobs())
    assert listed.rotten == ""
