"""An ingest becomes a blob, or stays one that can be committed: killed at each step in between, or on a full disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.errors import AlreadyExists, NotFound, ResourceExhausted

from tests.support.natsd import NatsServer
from tests.support.node import TestNode

MIB = 1 << 20
DATA = os.urandom(300_000)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()
KEPT = {"containerd.io/gc.root": "test"}
"""Nothing refers to these blobs, and nothing is to collect them."""
POINTS = ["settle: linked", "settle: committed", "commit: before COMMIT", "commit: after COMMIT"]
_DYING = """
import asyncio, os, signal, sys
from pathlib import Path
from shoal_bus.database import Database
from shoal_content.blobs.ingests import Ingests, Whole
from shoal_content.blobs.layout import Layout
from shoal_content.schema import MIGRATIONS
from shoal_content.blobs.store import Store

root, point, digest, size = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Dying(Layout):
    def place(self, file, digest):
        super().place(file, digest)
        if point == "settle: linked":
            die()

database = Database(root / "metadata.db", "test-node", MIGRATIONS, service="content")
layout = Dying(root)
ingests = Ingests(database, layout, Store(database, layout))

async def main():
    await ingests.settle(Whole("default", "r", digest, size))
    if point == "settle: committed":
        die()
    with database.write(durable=True) as tx:
        if point == "commit: after COMMIT":
            tx.on_commit(die)  # before the ingest's own link goes
        ingests.commit(tx, "default", "r", digest, size)
        if point == "commit: before COMMIT":
            die()

asyncio.run(main())
"""


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content")
        yield started


@pytest.fixture
def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def files(node: TestNode, part: str) -> list[Path]:
    return [path for path in (node.root / "content" / part).rglob("*") if path.is_file()]


async def write(client: Client, data: bytes, offset: int, **options: object) -> content.IngestStatus:
    request = content.WriteIngest.of({"ref": "r", "data": data, "offset": offset, "labels": KEPT, **options})
    return await client.call(content.INGEST_WRITE, request)


async def die_at(node: TestNode, client: Client, point: str) -> None:
    """The commit of an ingest of all of `DATA`, dead at `point`."""
    await write(client, DATA, 0)
    node.of("content").kill()
    command = [sys.executable, "-c", _DYING, str(node.root / "content"), point, DIGEST, str(len(DATA))]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


async def created(connection: Connection) -> list[str]:
    await asyncio.sleep(0.3)
    events = [received.event async for received in read_events(connection, start=1, follow=False)]
    return [event.topic for event in events]


@pytest.mark.parametrize("point", POINTS)
async def test_a_commit_that_was_killed_is_repeated_and_nothing_is_lost(
    node: TestNode, client: Client, connection: Connection, point: str
) -> None:
    await die_at(node, client, point)
    node.of("content").start()
    if point == POINTS[-1]:
        with pytest.raises(NotFound):
            await client.call(content.INGEST_STATUS, content.IngestRequest(ref="r"))
        with pytest.raises(AlreadyExists):
            await write(client, DATA, 0, commit=True, expected=DIGEST)
    else:
        status = await client.call(content.INGEST_STATUS, content.IngestRequest(ref="r"))
        assert status.offset == len(DATA)
        with pytest.raises(NotFound):
            await client.call(content.BLOB_INFO, content.BlobRequest(digest=DIGEST))
        assert (await write(client, b"", len(DATA), commit=True)).committed == DIGEST
    chunks = await client.collect(content.BLOB_READ, content.ReadBlob(digest=DIGEST))
    assert b"".join(chunk.data for chunk in chunks) == DATA
    assert [path.stat().st_nlink for path in files(node, "blobs")] == [1]
    assert files(node, "ingests") == []
    assert await created(connection) == ["/content/create"]


@pytest.mark.parametrize("point", POINTS[:-1])
async def test_a_commit_that_was_killed_leaves_nothing_when_its_ingest_is_aborted(
    node: TestNode, client: Client, connection: Connection, point: str
) -> None:
    await die_at(node, client, point)
    node.of("content").start()
    await client.call(content.INGEST_ABORT, content.IngestRequest(ref="r"))
    assert files(node, "blobs") == files(node, "ingests") == []
    node.of("content").kill()
    node.of("content").start()
    assert await created(connection) == []


@pytest.mark.parametrize("point", POINTS[1:-1])
@pytest.mark.parametrize("truncate", [False, True])
async def test_a_commit_that_came_to_nothing_and_other_bytes_then(
    node: TestNode, client: Client, point: str, *, truncate: bool
) -> None:
    """What it had linked to its place is there no more when the ingest becomes another blob."""
    await die_at(node, client, point)
    node.of("content").start()
    more = await write(client, b"more", 0 if truncate else len(DATA), truncate=truncate)
    assert files(node, "blobs") == []
    done = await write(client, b"", more.offset, commit=True)
    assert done.committed == "sha256:" + hashlib.sha256((b"" if truncate else DATA) + b"more").hexdigest()
    assert [path.stat().st_nlink for path in files(node, "blobs")] == [1]
    assert files(node, "ingests") == []


@pytest.mark.parametrize("point", POINTS[1:-1])
async def test_two_of_the_same_bytes_one_killed_the_other_aborted_or_committed(
    node: TestNode, client: Client, point: str
) -> None:
    """Who goes on first takes nothing from the other."""
    await die_at(node, client, point)
    node.of("content").start()
    request = content.WriteIngest(ref="second", data=DATA, commit=True, labels=KEPT)
    assert (await client.call(content.INGEST_WRITE, request)).committed == DIGEST
    await client.call(content.INGEST_ABORT, content.IngestRequest(ref="r"))
    chunks = await client.collect(content.BLOB_READ, content.ReadBlob(digest=DIGEST))
    assert b"".join(chunk.data for chunk in chunks) == DATA
    await client.call(content.BLOB_DELETE, content.BlobRequest(digest=DIGEST))
    assert files(node, "blobs") == files(node, "ingests") == []


@pytest.mark.timeout(180)
async def test_writes_commits_and_deletions_are_killed_at_random(
    node: TestNode, client: Client, connection: Connection
) -> None:
    generator, rounds = random.Random(20261125), 25
    pieces = [generator.randbytes(60_000) for _ in range(4)]
    digests = ["sha256:" + hashlib.sha256(piece).hexdigest() for piece in pieces]
    over = asyncio.Event()

    async def churn(at: int) -> int:
        count = 0
        while not over.is_set():
            for offset in (0, 30_000):
                request = content.WriteIngest(
                    ref=f"r{at}", offset=offset, data=pieces[at][offset : offset + 30_000], commit=offset > 0,
                    expected=digests[at], labels=KEPT,
                )  # fmt: skip
                try:
                    await client.call(content.INGEST_WRITE, request, timeout=60, patience=30)
                except AlreadyExists:  # the answer of a commit that a kill came between
                    break
            chunks = await client.collect(content.BLOB_READ, content.ReadBlob(digest=digests[at]), timeout=60)
            assert b"".join(chunk.data for chunk in chunks) == pieces[at]
            try:
                request_ = content.BlobRequest(digest=digests[at])
                await client.call(content.BLOB_DELETE, request_, timeout=60, patience=30)
            except NotFound:
                pass
            count += 1
        return count

    churning = [asyncio.create_task(churn(at)) for at in range(len(pieces))]
    for _ in range(rounds):
        await asyncio.sleep(generator.uniform(0.0, 0.4))
        node.of("content").kill()
        await asyncio.to_thread(node.of("content").start)
        for task in churning:
            assert not task.done() or task.result()
    over.set()
    assert min(await asyncio.gather(*churning)) > 0
    node.of("content").kill()
    node.of("content").start()
    assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []
    assert await client.collect(content.INGEST_LIST, content.ListBlobs()) == []
    assert files(node, "blobs") == files(node, "ingests") == files(node, "quarantine") == []
    topics = await created(connection)
    assert topics.count("/content/create") == topics.count("/content/delete") > 0
    assert "/content/rotten" not in topics


# -------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    """A node whose root is a file system of 16 MiB."""
    disk, root = tmp_path / "disk", tmp_path / "small" / "root"
    root.mkdir(parents=True)
    with disk.open("wb") as made:
        made.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-N", "256", "-m", "0", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk), str(root)], check=True)
    try:
        with TestNode(tmp_path / "small", natsd) as started:
            started.start("content")
            yield started
    finally:
        subprocess.run(["umount", str(root)], check=True)


def fill(node: TestNode) -> Path:
    """A file that takes all there is."""
    filler = node.root / "filler"
    with filler.open("ab", buffering=0) as file:
        size = MIB
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    return filler


async def test_commits_on_a_full_disk_are_refused_or_whole_and_go_on_once_there_is_room(
    small: TestNode, connection: Connection
) -> None:
    client = Client(connection, small.name)
    count = 40
    pieces = [bytes([number]) * 20_000 for number in range(count)]
    for number, piece in enumerate(pieces):
        await client.call(content.INGEST_WRITE, content.WriteIngest(ref=f"r{number}", data=piece))
    filler = fill(small)
    outcomes: list[str | ResourceExhausted] = []
    for number in range(count):
        # Labels that the database has to grow for.
        labels = KEPT | {f"k{n}": "v" * 1000 for n in range(8)}
        request = content.WriteIngest(ref=f"r{number}", offset=20_000, commit=True, labels=labels)
        try:
            outcomes.append((await client.call(content.INGEST_WRITE, request, timeout=20)).committed or "")
        except ResourceExhausted as error:
            outcomes.append(error)
        if number % 8 == 7:
            fill(small)  # what the database has let go of
    refused = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, ResourceExhausted)]
    assert refused
    with pytest.raises(ResourceExhausted):
        await client.call(content.INGEST_WRITE, content.WriteIngest(ref="more", data=bytes(500_000)))
    small.of("content").kill()
    filler.unlink()
    small.of("content").start()
    listed = {blob.digest for blob in await client.collect(content.BLOB_LIST, content.ListBlobs())}
    assert listed == {outcome for outcome in outcomes if isinstance(outcome, str)}
    for number in refused:
        request = content.WriteIngest(ref=f"r{number}", offset=20_000, commit=True, labels=KEPT)
        assert (await client.call(content.INGEST_WRITE, request)).committed
    assert (await client.collect(content.INGEST_LIST, content.ListBlobs(filters=["ref!=more"]))) == []
    for number, piece in enumerate(pieces):
        digest = "sha256:" + hashlib.sha256(piece).hexdigest()
        chunks = await client.collect(content.BLOB_READ, content.ReadBlob(digest=digest))
        assert b"".join(chunk.data for chunk in chunks) == piece, number
        assert (small.root / "content/blobs/sha256" / digest.removeprefix("sha256:")).stat().st_nlink == 1
    with sqlite3.connect(small.root / "content" / "metadata.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


async def test_an_upload_that_does_not_fit_leaves_its_space(small: TestNode, connection: Connection) -> None:
    client, offset = Client(connection, small.name), 0

    async def forever() -> None:
        nonlocal offset
        while True:
            piece = content.WriteIngest(ref="r", offset=offset, data=os.urandom(400_000))
            offset = (await client.call(content.INGEST_WRITE, piece)).offset

    with pytest.raises(ResourceExhausted, match="no space left"):
        await forever()
    assert (await client.call(content.INGEST_STATUS, content.IngestRequest(ref="r"))).offset == offset > 0
    await client.call(content.INGEST_ABORT, content.IngestRequest(ref="r"))
    assert files(small, "ingests") == []
    fits = content.WriteIngest(ref="r", data=os.urandom(400_000), commit=True)
    assert (await client.call(content.INGEST_WRITE, fits)).committed
