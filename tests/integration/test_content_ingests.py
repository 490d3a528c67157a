"""Ingests: one writer at a time, what was announced, resuming, expiry; and labels of blobs, over the bus."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ShoalError,
    Unavailable,
)

from tests.support.natsd import NatsServer
from tests.support.node import TestNode

DATA = bytes(range(256)) * 1000
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()
DIGEST_512 = "sha512:" + hashlib.sha512(DATA).hexdigest()


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    node.start("content")
    return Client(connection, node.name)


async def write(client: Client, data: bytes = DATA, ref: str = "r", **options: object) -> content.IngestStatus:
    request = content.WriteIngest.of({"ref": ref, "data": data, **options})
    return await client.call(content.INGEST_WRITE, request)


async def opened(client: Client, session: str, ref: str = "r", **options: object) -> content.IngestStatus:
    return await client.call(content.INGEST_OPEN, content.OpenIngest.of({"ref": ref, "session": session, **options}))


async def refs(client: Client, *filters: str) -> list[str]:
    return [one.ref for one in await client.collect(content.INGEST_LIST, content.ListBlobs(filters=list(filters)))]


def change(node: TestNode, sql: str) -> None:
    """What time would do, done to the service's database."""
    with sqlite3.connect(node.root / "content" / "metadata.db", timeout=10) as database:
        assert database.execute(sql).rowcount == 1
    database.close()


def ingest_files(node: TestNode) -> list[Path]:
    return list((node.root / "content" / "ingests").iterdir())


async def test_second_writer_of_a_ref_is_told_until_the_first_lets_go(client: Client) -> None:
    await opened(client, "one")
    await write(client, DATA[:1000], session="one")
    for session in ("two", ""):
        with pytest.raises(Unavailable, match="another writer") as error:
            await write(client, DATA[1000:], offset=1000, session=session)
        assert "try again in" in error.value.hint
    with pytest.raises(Unavailable):
        await opened(client, "two")
    release = content.ReleaseIngest(ref="r", session="two")
    await client.call(content.INGEST_RELEASE, release)  # it isn't theirs to release
    with pytest.raises(Unavailable):
        await opened(client, "two")
    await client.call(content.INGEST_RELEASE, content.ReleaseIngest(ref="r", session="one"))
    assert (await opened(client, "two")).offset == 1000
    done = await write(client, DATA[1000:], offset=1000, session="two", commit=True)
    assert done.committed == DIGEST
    with pytest.raises(NotFound):
        await client.call(content.INGEST_RELEASE, content.ReleaseIngest(ref="r", session="two"))


async def test_writer_that_died_is_in_nobodys_way_for_long(client: Client, node: TestNode) -> None:
    await opened(client, "dead")
    with pytest.raises(Unavailable):
        await opened(client, "two")
    change(node, f"UPDATE ingests SET session_until = {time.time() - 0.1}")
    await opened(client, "two")
    # Nor does a clock that was set back give a session more time than any has.
    change(node, f"UPDATE ingests SET session_until = {time.time() + 86_400}")
    await opened(client, "three")


async def test_more_than_was_announced_is_refused_at_once_and_not_written(client: Client, node: TestNode) -> None:
    with pytest.raises(FailedPrecondition, match="3 were announced"):
        await write(client, b"1234", total=3)
    assert await refs(client) == []
    await write(client, b"12", total=3)
    with pytest.raises(FailedPrecondition, match="4 bytes, 3 were announced"):
        await write(client, b"34", offset=2)
    assert ingest_files(node)[0].read_bytes() == b"12"
    with pytest.raises(FailedPrecondition, match="was announced as 3, and now as 4"):
        await write(client, b"34", offset=2, total=4)
    with pytest.raises(FailedPrecondition, match="2 bytes, 3 were announced"):
        await write(client, b"", offset=2, commit=True)
    digests = ["sha256:" + hashlib.sha256(text).hexdigest() for text in (b"123", b"124")]
    await write(client, b"", offset=2, expected=digests[0])
    with pytest.raises(FailedPrecondition, match="digest was announced as"):
        await write(client, b"", offset=2, expected=digests[1])
    with pytest.raises(FailedPrecondition, match="its digest is"):
        await write(client, b"4", offset=2, commit=True)
    with pytest.raises(OutOfRange):  # its bytes are there, and others than these
        await write(client, b"3", offset=2, commit=True)
    assert (await write(client, b"123", truncate=True, commit=True)).committed == digests[0]


async def test_bytes_that_are_there_may_be_sent_again_and_others_not(client: Client) -> None:
    await write(client, DATA[:5000])
    assert (await write(client, DATA[1000:3000], offset=1000)).offset == 5000
    assert (await write(client, DATA[4000:6000], offset=4000)).offset == 6000
    with pytest.raises(OutOfRange, match="is at 6000"):
        await write(client, b"x" * 2000, offset=4000)
    with pytest.raises(OutOfRange):
        await write(client, DATA[7000:], offset=7000)
    with pytest.raises(OutOfRange):  # there is more than its writer knows of
        await write(client, DATA[4000:5000], offset=4000, commit=True)
    assert (await write(client, DATA[6000:], offset=6000, commit=True)).committed == DIGEST


async def test_ingest_begins_again_at_nothing_when_truncated(client: Client, node: TestNode) -> None:
    await write(client, b"wrong" * 1000)
    with pytest.raises(InvalidArgument):
        await write(client, b"x", offset=5, truncate=True)
    assert (await write(client, DATA[:100], truncate=True)).offset == 100
    assert len(ingest_files(node)) == 1
    assert (await write(client, DATA[100:], offset=100, commit=True)).committed == DIGEST
    assert ingest_files(node) == []


async def test_sha512_is_as_good_as_sha256(client: Client, node: TestNode) -> None:
    for number, expected in enumerate((DIGEST_512, DIGEST)):  # the same bytes, under either name
        await write(client, DATA[:1000], ref=f"r{number}", expected=expected)
        done = await write(client, DATA[1000:], ref=f"r{number}", offset=1000, commit=True, expected=expected)
        assert done.committed == expected
    await write(client, DATA[:5], ref="late")  # the algorithm is known at the end only
    late = "sha512:" + hashlib.sha512(DATA[:9]).hexdigest()
    assert (await write(client, DATA[5:9], ref="late", offset=5, commit=True, expected=late)).committed == late
    with pytest.raises(FailedPrecondition):
        await write(client, DATA, ref="no", commit=True, expected="sha512:" + "0" * 128)
    for digest in (DIGEST, DIGEST_512):
        chunks = await client.collect(content.BLOB_READ, content.ReadBlob(digest=digest))
        assert b"".join(chunk.data for chunk in chunks) == DATA
        claim = await client.call(content.BLOB_CLAIM, content.ClaimBlob(digest=digest))
        assert Path(claim.path).read_bytes() == DATA
        await client.call(content.BLOB_DELETE, content.BlobRequest(digest=digest))
    assert not (node.root / "content/blobs/sha512" / DIGEST_512.removeprefix("sha512:")).exists()


async def test_commits_of_the_same_bytes_by_many_writers_make_one_blob(
    client: Client, node: TestNode, connection: Connection
) -> None:
    count = 8

    async def one(number: int) -> str:
        own = client.with_namespace("other" if number % 4 == 3 else "default")
        await write(own, DATA[:1000], ref=f"r{number}")
        try:
            return (await write(own, DATA[1000:], ref=f"r{number}", offset=1000, commit=True)).committed or ""
        except AlreadyExists:
            return "already"

    outcomes = await asyncio.gather(*(one(number) for number in range(count)))
    assert sorted(outcomes) == sorted([DIGEST] * 2 + ["already"] * (count - 2))  # one in each namespace
    assert await refs(client) == await refs(client.with_namespace("other")) == []
    assert ingest_files(node) == []
    path = node.root / "content/blobs/sha256" / DIGEST.removeprefix("sha256:")
    assert (path.read_bytes(), path.stat().st_nlink) == (DATA, 1)
    await asyncio.sleep(0.3)
    events = [received.event async for received in read_events(connection, start=1, follow=False)]
    created = [(event.topic, event.namespace) for event in events]
    assert sorted(created) == [("/content/create", "default"), ("/content/create", "other")]


def read_so_far(pid: int) -> int:
    """Bytes a process has read, from wherever (proc(5), io)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


async def test_commit_reads_nothing_again_unless_the_bytes_came_before_a_restart(
    client: Client, node: TestNode
) -> None:
    step, steps = 512 * 1024, 40
    data = os.urandom(step)
    digest = "sha256:" + hashlib.sha256(data * steps).hexdigest()
    read = {}
    for ref in ("warm", "cold"):
        for number in range(steps):
            await write(client, data, ref=ref, offset=number * step)
        if ref == "cold":
            node.of("content").kill()
            node.of("content").start()
        before = read_so_far(node.of("content").pid)
        done = await write(client, b"", ref=ref, offset=step * steps, commit=True, expected=digest)
        assert done.committed == digest
        read[ref] = read_so_far(node.of("content").pid) - before
        await client.call(content.BLOB_DELETE, content.BlobRequest(digest=digest))
    assert read["warm"] < step * steps / 4 < step * steps <= read["cold"]


async def test_an_uploads_bytes_do_not_go_through_the_database(client: Client, node: TestNode) -> None:
    step, steps = 512 * 1024, 16
    for number in range(steps):
        await write(client, os.urandom(step), offset=number * step)
    place = node.root / "content"
    assert sum((place / f"metadata.db{suffix}").stat().st_size for suffix in ("", "-wal")) < step * steps / 2


async def test_abandoned_ingest_of_a_client_expires_and_one_at_work_does_not(client: Client, node: TestNode) -> None:
    await write(client, DATA[:10], ref="old")
    await write(client, DATA[:10], ref="new")
    change(node, f"UPDATE ingests SET updated_at = {time.time() - 25 * 3600} WHERE ref = 'old'")
    change(node, f"UPDATE ingests SET started_at = {time.time() - 25 * 3600} WHERE ref = 'new'")
    node.of("content").kill()
    node.of("content").start()
    async with asyncio.timeout(20):
        while await refs(client) != ["new"]:
            await asyncio.sleep(0.05)
    assert len(ingest_files(node)) == 1


async def test_ingests_are_found_by_every_field(client: Client) -> None:
    await write(client, b"12", ref="one", total=9, labels={"a.b": "c"})
    await write(client, b"123", ref="two", expected=DIGEST)
    for filters, found in (
        (["ref==one"], ["one"]),
        (["ref~=^t"], ["two"]),
        (["offset==3"], ["two"]),
        (["total==9"], ["one"]),
        (["expected"], ["two"]),
        ([f"expected=={DIGEST}", "labels.a.b==c"], ["one", "two"]),
        (["labels.none"], []),
    ):
        assert await refs(client, *filters) == found, filters


async def test_labels_of_a_blob_change_as_containerd_has_it(client: Client) -> None:
    await write(client, commit=True, labels={"keep": "1", "change": "1", "go": "1"})

    async def update(labels: dict[str, str], *fields: str) -> dict[str, str]:
        request = content.UpdateBlob(digest=DIGEST, labels=labels, fields=list(fields))
        told = await client.call(content.BLOB_UPDATE, request)
        info = await client.call(content.BLOB_INFO, content.BlobRequest(digest=DIGEST))
        assert info == told
        assert info.updated_at > info.created_at
        return info.labels

    changed = {"change": "2", "io.x/y.z": "new", "go": "", "ignored": "x"}
    assert await update(changed, "labels.change", "labels.io.x/y.z", "labels.go") == {
        "keep": "1", "change": "2", "io.x/y.z": "new",
    }  # fmt: skip
    assert await update({"only": "1", "empty": ""}) == {"only": "1"}
    assert [one.digest for one in await blobs(client, "labels.only==1")] == [DIGEST]
    with pytest.raises(InvalidArgument, match="size"):
        await update({}, "size")
    with pytest.raises(NotFound):  # the labels of another namespace are its own
        await client.with_namespace("other").call(content.BLOB_UPDATE, content.UpdateBlob(digest=DIGEST))


async def blobs(client: Client, *filters: str) -> list[content.BlobInfo]:
    return await client.collect(content.BLOB_LIST, content.ListBlobs(filters=list(filters)))


async def test_a_claim_is_a_path_that_nobody_can_guess_and_goes_when_its_time_is_up(
    client: Client, node: TestNode
) -> None:
    await write(client, commit=True)
    claims = node.root / "content" / "claims"
    claim = await client.call(content.BLOB_CLAIM, content.ClaimBlob(digest=DIGEST, ttl_seconds=3600))
    path = Path(claim.path)
    assert path.parent == claims
    assert DIGEST.removeprefix("sha256:") not in claim.path
    assert len(path.name) >= 32
    again = await client.call(content.BLOB_CLAIM, content.ClaimBlob(digest=DIGEST, ttl_seconds=1))
    assert (again.path, again.expires_at) == (claim.path, claim.expires_at)
    with pytest.raises(NotFound):
        await client.with_namespace("other").call(content.BLOB_CLAIM, content.ClaimBlob(digest=DIGEST))
    await client.call(content.BLOB_DELETE, content.BlobRequest(digest=DIGEST))
    assert not any((node.root / "content" / "blobs" / "sha256").iterdir())
    (claims / "stray").write_bytes(b"left by a kill")
    node.of("content").kill()
    node.of("content").start()
    assert path.read_bytes() == DATA
    assert list(claims.iterdir()) == [path]
    change(node, f"UPDATE claims SET expires_at = {time.time() - 1}")
    node.of("content").kill()
    node.of("content").start()
    assert list(claims.iterdir()) == []


@pytest.mark.parametrize("request_", [{"ref": "", "data": b""}, {"ref": "x" * 513}, {"ref": "r", "session": "x" * 65}])
async def test_what_is_no_write_is_refused(client: Client, request_: dict[str, object]) -> None:
    with pytest.raises(ShoalError):
        await write(client, **request_)  # type: ignore[arg-type]
    assert await refs(client) == []
