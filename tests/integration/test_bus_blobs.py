"""Blobs larger than any message, to and from a node whose files we don't see, its service killed in the middle."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content
from shoal_bus.blobs import WINDOW, download, upload
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import DataLoss, FailedPrecondition, NotFound, OutOfRange, Unavailable

from tests.support.natsd import NatsServer
from tests.support.node import TestNode

SIZE = 24 << 20
DATA = os.urandom(SIZE)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()
KEPT = {"containerd.io/gc.root": "test"}


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content")
        yield started


@pytest.fixture
def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


async def whole(client: Client, digest: str, **options: int) -> bytes:
    return b"".join([data async for data in download(client, digest, **options)])


async def ingests(client: Client) -> list[content.IngestStatus]:
    return await client.collect(content.INGEST_LIST, content.ListBlobs())


class Slow(io.BytesIO):
    """Bytes that come slowly enough for something to happen meanwhile."""

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(0.02)
        return super().read(size)


class Pipe:
    """What can't be read twice, and gives less than it is asked for."""

    def __init__(self, data: bytes) -> None:
        self._left = io.BytesIO(data)

    def read(self, size: int, /) -> bytes:
        return self._left.read(min(size, 100_000))


async def test_a_blob_of_any_size_goes_and_comes_back(client: Client) -> None:
    told: list[int] = []
    digest = await upload(client, io.BytesIO(DATA), total=SIZE, labels={"a": "b"}, on_progress=told.append)
    assert digest == DIGEST
    assert told == sorted(told)
    assert told[-1] == SIZE
    assert await whole(client, digest) == DATA
    assert await whole(client, digest, offset=SIZE - 10) == DATA[-10:]
    assert await whole(client, digest, offset=1 << 20, size=3 << 20) == DATA[1 << 20 : 4 << 20]
    info = await client.call(content.BLOB_INFO, content.BlobRequest(digest=digest))
    assert info.labels == {"a": "b"}
    assert await upload(client, Pipe(DATA)) == digest  # there already
    assert await upload(client, io.BytesIO(DATA), expected=digest, labels={"c": "d"}) == digest
    info = await client.call(content.BLOB_INFO, content.BlobRequest(digest=digest))
    assert info.labels == {"a": "b", "c": "d"}
    assert await ingests(client) == []
    with pytest.raises(NotFound):
        await whole(client.with_namespace("other"), digest)
    with pytest.raises(OutOfRange):
        await whole(client, digest, offset=SIZE + 1)


@pytest.mark.parametrize("size", [0, 1, 512 * 1024, 512 * 1024 + 1])
async def test_small_ones_do_too(client: Client, size: int) -> None:
    digest = await upload(client, Pipe(DATA[:size]), algorithm="sha512")
    assert digest == "sha512:" + hashlib.sha512(DATA[:size]).hexdigest()
    assert await whole(client, digest) == DATA[:size]


async def test_what_is_not_as_announced_is_refused_and_leaves_nothing(client: Client) -> None:
    with pytest.raises(FailedPrecondition, match="was expected"):
        await upload(client, io.BytesIO(DATA[:1000]), expected=DIGEST)
    for total in (999, 1001, 3 << 20):
        with pytest.raises(FailedPrecondition):
            await upload(client, io.BytesIO(DATA[: 2 << 20] if total > 2000 else DATA[:1000]), total=total)
    assert await ingests(client) == []
    assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []


async def test_an_upload_goes_on_while_the_service_is_killed_again_and_again(client: Client, node: TestNode) -> None:
    uploading = asyncio.create_task(upload(client, Slow(DATA), labels=KEPT))
    for _ in range(3):
        await asyncio.sleep(0.25)
        node.of("content").kill()
        await asyncio.to_thread(node.of("content").start)
    assert not uploading.done() or uploading.exception() is None
    assert await uploading == DIGEST
    assert await whole(client, DIGEST) == DATA
    assert await ingests(client) == []


async def test_a_download_goes_on_where_it_was_when_the_service_is_killed(client: Client, node: TestNode) -> None:
    await upload(client, io.BytesIO(DATA), labels=KEPT)
    came, killed = bytearray(), 0
    async for data in download(client, DIGEST):
        came += data
        if len(came) > SIZE // 3 and not killed:
            killed = len(came)
            node.of("content").kill()
            await asyncio.to_thread(node.of("content").start)
    assert 0 < killed < SIZE
    assert bytes(came) == DATA


async def test_an_upload_whose_client_died_is_gone_on_with_by_the_next(client: Client, node: TestNode) -> None:
    first = asyncio.create_task(upload(client, Slow(DATA), ref="mine"))
    async with asyncio.timeout(20):
        while not (found := await ingests(client)) or found[0].offset < 4 << 20:
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable, match="another writer"):
        await upload(client, io.BytesIO(DATA), ref="mine")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    (left,) = await ingests(client)
    told: list[int] = []
    assert await upload(client, Pipe(DATA), ref="mine", on_progress=told.append) == DIGEST
    assert told[0] > left.offset  # what was there wasn't sent again
    assert await whole(client, DIGEST) == DATA


async def test_an_ingest_of_something_else_is_not_gone_on_with(client: Client) -> None:
    begun = content.WriteIngest(ref="mine", data=DATA[1000:2000])
    await client.call(content.INGEST_WRITE, begun)
    with pytest.raises(FailedPrecondition, match="announced"):  # by us, who have read it all
        await upload(client, io.BytesIO(DATA), ref="mine")
    assert [one.offset for one in await ingests(client)] == [SIZE]  # a ref's ingest is its owner's to drop
    await client.call(content.INGEST_ABORT, content.IngestRequest(ref="mine"))
    await client.call(content.INGEST_WRITE, begun)
    with pytest.raises(FailedPrecondition, match="has 1000 bytes, and what is uploaded 10"):
        await upload(client, io.BytesIO(DATA[:10]), ref="mine")
    assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []


async def test_damaged_bytes_are_told_at_the_end(client: Client, node: TestNode) -> None:
    await upload(client, io.BytesIO(DATA))
    path = node.root / "content" / "blobs" / "sha256" / DIGEST.removeprefix("sha256:")
    with path.open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(DataLoss, match="what came has the digest"):
        await whole(client, DIGEST)
    os.truncate(path, SIZE // 2)
    with pytest.raises(DataLoss):
        await whole(client, DIGEST)


async def test_copies_of_the_service_share_an_upload(client: Client, node: TestNode) -> None:
    """Pieces under way at once go to whichever copy, and may be overtaken."""
    await asyncio.to_thread(node.start, "content", "content")
    assert await upload(client, io.BytesIO(DATA)) == DIGEST
    assert await whole(client, DIGEST) == DATA


async def test_neither_takes_memory_for_more_than_a_few_messages(client: Client, tmp_path: Path) -> None:
    """Of 400 MB, of which no process can have more than a piece: ours may grow by no more than some windows."""
    large = 400 << 20
    place = tmp_path / "large"
    with place.open("wb") as file:
        file.truncate(large)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with place.open("rb") as file:
        digest = await upload(client, file)
    count = 0
    async for data in download(client, digest):
        count += len(data)
    assert count == large
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 16 * WINDOW * 512 * 1024
