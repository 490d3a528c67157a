"""Scrubbing over the bus: damaged blobs are found, told of, set aside, not served, and healed by who fetches them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.errors import DataLoss, NotFound

from tests.support import images
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import running

DATA = os.urandom(3 << 20)
KEPT = {"containerd.io/gc.root": "test"}
"""Nothing refers to these blobs, and nothing is to collect them."""
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content")
        yield started


@pytest.fixture
def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


async def write(client: Client, data: bytes = DATA, **options: object) -> str:
    ref = hashlib.sha256(data).hexdigest()
    for offset in range(0, max(1, len(data)), 500_000):
        piece, last = data[offset : offset + 500_000], offset + 500_000 >= len(data)
        request = content.WriteIngest.of(
            {"ref": ref, "offset": offset, "data": piece, "commit": last, "labels": KEPT} | (options if last else {})
        )
        status = await client.call(content.INGEST_WRITE, request)
    assert status.committed is not None
    return status.committed


def path_of(node: TestNode, digest: str) -> Path:
    algorithm, _, value = digest.partition(":")
    return node.root / "content" / "blobs" / algorithm / value


def flip(path: Path) -> bytes:
    """One bit turned over in the middle; what the file has then."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0] ^ 1
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte]))
    return path.read_bytes()


async def scrub(client: Client, *digests: str) -> content.ScrubReport:
    return await client.operate(content.BLOB_SCRUB, content.ScrubBlobs(digests=list(digests)), timeout=60)


def quarantine(node: TestNode) -> list[Path]:
    return list((node.root / "content" / "quarantine").iterdir())


async def rotten_events(connection: Connection) -> list[tuple[str, str]]:
    await asyncio.sleep(0.3)
    events = [received.event async for received in read_events(connection, start=1, follow=False)]
    return sorted((event.namespace, event.payload["digest"]) for event in events if event.topic == "/content/rotten")


async def test_a_scrub_of_sound_blobs_reads_them_all_and_finds_nothing(client: Client, node: TestNode) -> None:
    digests = [await write(client), await write(client, b""), await write(client, DATA[:10])]
    digests.append(await write(client, DATA[:99], expected="sha512:" + hashlib.sha512(DATA[:99]).hexdigest()))
    await write(client.with_namespace("other"), b"of somebody else")
    progress: list[content.ScrubProgress] = []
    report = await client.operate(content.BLOB_SCRUB, content.ScrubBlobs(), on_progress=progress.append)
    assert report == content.ScrubReport(blobs=4, bytes=len(DATA) + 10 + 99)
    assert (await scrub(client, digests[2], digests[2])).blobs == 1
    with pytest.raises(NotFound):  # it is there, but not for us to ask after
        await scrub(client, "sha256:" + hashlib.sha256(b"of somebody else").hexdigest())
    assert quarantine(node) == []


async def test_a_rotten_blob_is_told_of_set_aside_and_not_served_until_it_is_written_again(
    client: Client, node: TestNode, connection: Connection
) -> None:
    other = client.with_namespace("other")
    await write(client, labels=KEPT | {"a": "b"})
    await write(other)
    sound = await write(client, DATA[:1000])
    claim = await client.call(content.BLOB_CLAIM, content.ClaimBlob(digest=DIGEST))
    bad = flip(path_of(node, DIGEST))
    report = await scrub(client)
    assert (report.blobs, [one.digest for one in report.rotten]) == (2, [DIGEST])
    assert report.rotten[0].problem == f"its digest is sha256:{hashlib.sha256(bad).hexdigest()}"
    assert [path.read_bytes() for path in quarantine(node)] == [bad]
    assert not path_of(node, DIGEST).exists()
    assert await rotten_events(connection) == [("default", DIGEST), ("other", DIGEST)]

    for of in (client, other):
        info = await of.call(content.BLOB_INFO, content.BlobRequest(digest=DIGEST))
        assert info.rotten
        with pytest.raises(DataLoss) as error:
            await of.collect(content.BLOB_READ, content.ReadBlob(digest=DIGEST))
        assert "again" in error.value.hint
        with pytest.raises(DataLoss):
            await of.call(content.BLOB_CLAIM, content.ClaimBlob(digest=DIGEST))
    assert (await scrub(client)).blobs == 1  # it isn't read again, and told of all the same
    assert (await scrub(client)).rotten == report.rotten
    listed = await client.collect(content.BLOB_LIST, content.ListBlobs(filters=["rotten"]))
    assert [one.digest for one in listed] == [DIGEST]

    assert await write(other) == DIGEST  # heals it for everybody
    chunks = await client.collect(content.BLOB_READ, content.ReadBlob(digest=DIGEST))
    assert b"".join(chunk.data for chunk in chunks) == DATA
    info = await client.call(content.BLOB_INFO, content.BlobRequest(digest=DIGEST))
    assert (info.labels, info.rotten) == (KEPT | {"a": "b"}, "")
    assert [path.read_bytes() for path in quarantine(node)] == [bad]
    assert (await scrub(client)).rotten == []
    again = await client.call(content.BLOB_CLAIM, content.ClaimBlob(digest=DIGEST))
    assert again.path != claim.path  # that one's bytes are the damaged ones
    assert Path(again.path).read_bytes() == DATA
    assert await rotten_events(connection) == [("default", DIGEST), ("other", DIGEST)]
    assert path_of(node, sound).read_bytes() == DATA[:1000]


@pytest.mark.parametrize("damage", ["gone", "short", "long"])
async def test_bytes_that_are_gone_or_have_another_length_are_found(
    client: Client, node: TestNode, damage: str
) -> None:
    await write(client)
    path = path_of(node, DIGEST)
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, len(DATA) + (-1 if damage == "short" else 1))
    if damage == "gone":
        with pytest.raises(DataLoss, match="gone"):
            await client.call(content.BLOB_CLAIM, content.ClaimBlob(digest=DIGEST))
    if damage != "long":  # before anybody has found it: an error, and no short answer
        with pytest.raises(DataLoss, match="damaged"):
            await client.collect(content.BLOB_READ, content.ReadBlob(digest=DIGEST))
    (found,) = (await scrub(client)).rotten
    assert ("gone" if damage == "gone" else "bytes instead of") in found.problem
    assert len(quarantine(node)) == (damage != "gone")
    node.of("content").kill()
    node.of("content").start()
    assert (await scrub(client)).rotten == [found]
    assert await write(client) == DIGEST


async def test_a_rotten_blob_that_nobody_wants_any_more_goes_and_its_bytes_stay_aside(
    client: Client, node: TestNode
) -> None:
    await write(client)
    flip(path_of(node, DIGEST))
    assert (await scrub(client)).rotten
    await client.call(content.BLOB_DELETE, content.BlobRequest(digest=DIGEST))
    with pytest.raises(NotFound):
        await client.call(content.BLOB_INFO, content.BlobRequest(digest=DIGEST))
    node.of("content").kill()
    node.of("content").start()
    assert len(quarantine(node)) == 1
    assert await write(client) == DIGEST


async def test_a_pull_heals_what_was_rotten_of_its_image(client: Client, node: TestNode, tmp_path: Path) -> None:
    layer = images.Layer([images.file("f", os.urandom(200_000))])
    image = images.Image.build([layer])
    with running(tmp_path / "registry") as registry:
        name = images.push(image, registry.host, "app")
        request = content.PullImage(name=name, snapshotter="")
        await client.operate(content.IMAGE_PULL, request, timeout=60)
        for digest in image.layers:
            flip(path_of(node, digest))
        assert [one.digest for one in (await scrub(client)).rotten] == image.layers
        await client.operate(content.IMAGE_PULL, request, timeout=60)
        assert (await scrub(client)).rotten == []


async def test_a_scrub_goes_on_beside_deletions_and_writes(client: Client, node: TestNode) -> None:
    """Nothing that goes, or comes back, while it is read is taken for rotten."""
    pieces = [os.urandom(1 << 20) for _ in range(12)]
    digests = [await write(client, piece) for piece in pieces]
    over = asyncio.Event()

    async def churn() -> None:
        number = 0
        while not over.is_set():
            at = number % len(pieces)
            await client.call(content.BLOB_DELETE, content.BlobRequest(digest=digests[at]))
            if number % 3:
                node.root.joinpath("content", "blobs", "sha256", digests[at].removeprefix("sha256:")).unlink(True)
            await write(client, pieces[at])
            number += 1

    churning = asyncio.create_task(churn())
    for _ in range(15):
        assert (await scrub(client)).rotten == []
    over.set()
    await churning
    assert quarantine(node) == []
    assert len((await scrub(client)).rotten) == 0


async def test_a_scrub_is_finished_by_the_next_copy(client: Client, node: TestNode) -> None:
    for number in range(20):
        await write(client, os.urandom(1 << 20) + bytes([number]))
    await write(client)
    flip(path_of(node, DIGEST))
    scrubbing = asyncio.create_task(scrub(client))
    await asyncio.sleep(0.05)
    node.of("content").kill()
    await asyncio.to_thread(node.of("content").start)
    assert [one.digest for one in (await scrubbing).rotten] == [DIGEST]
    assert len(quarantine(node)) == 1
