"""A disk that is full to the last byte under the services' databases: told, survived, and over when there is room."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.database import Database
from shoal_bus.errors import ResourceExhausted

from tests.support.disks import MIB, disk
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

MKFS = {
    "btrfs": ["mkfs.btrfs", "-q"],
    "btrfs, data and metadata mixed": ["mkfs.btrfs", "-q", "-M"],
    "ext4": ["mkfs.ext4", "-q", "-m", "0"],
}


@pytest.fixture(params=MKFS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where there is little room."""
    (tmp_path / "place").mkdir()
    with disk(tmp_path / "place", 128 * MIB, MKFS[request.param]) as point:
        yield point


@pytest.fixture
def node(place: Path, tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    (tmp_path / "root").symlink_to(place)
    with TestNode(tmp_path, natsd) as started:
        started.start("content", "snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def fill(place: Path) -> None:
    """Takes all the room there is, and has everything written back, so that each page has to ask for its own again."""
    for number in range(3):
        with suppress(OSError), (place / f"filler-{number}").open("wb", buffering=0) as file:
            size = MIB
            while size >= 512:
                try:
                    file.write(os.urandom(size))
                    os.fsync(file.fileno())
                except OSError:
                    size //= 2
        subprocess.run(["sync", "-f", str(place)], check=True)


def empty(place: Path) -> None:
    for filler in place.glob("filler-*"):
        filler.unlink()
    subprocess.run(["sync", "-f", str(place)], check=True)


@pytest.mark.timeout(120)
async def test_services_outlive_a_disk_that_is_full(node: TestNode, client: Client, place: Path) -> None:
    before = [node.of(name).pid for name in ("content", "snapshot")]
    await client.call(snapshot.SNAPSHOT_PREPARE, snapshot.PrepareSnapshot(key="a"))
    await asyncio.to_thread(fill, place)
    refused = 0
    for number in range(12):
        assert [s.key for s in await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())][:1] == ["a"]
        assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []
        wanted = {"id": f"l{number}", "labels": {"x": "y" * 60_000}}
        for verb, request in (
            (snapshot.SNAPSHOT_PREPARE, snapshot.PrepareSnapshot(key=f"b{number}", labels={"x": "y" * 4000})),
            (content.LEASE_CREATE, content.CreateLease.of(wanted)),
        ):
            try:
                await client.call(verb, request, timeout=20)  # type: ignore[arg-type]
            except ResourceExhausted:
                refused += 1
        await asyncio.to_thread(subprocess.run, ["sync", "-f", str(place)], check=True)
    assert refused >= 6
    await asyncio.to_thread(empty, place)
    await client.call(snapshot.SNAPSHOT_PREPARE, snapshot.PrepareSnapshot(key="c"))
    await client.call(content.LEASE_CREATE, content.CreateLease(id="c"))
    assert [node.of(name).pid for name in ("content", "snapshot")] == before
    assert all(node.of(name).running for name in ("content", "snapshot"))


async def test_a_node_starts_on_a_disk_that_is_full(node: TestNode, client: Client, place: Path) -> None:
    await client.call(snapshot.SNAPSHOT_PREPARE, snapshot.PrepareSnapshot(key="a"))
    await asyncio.to_thread(fill, place)
    node.of("snapshot").kill()
    node.of("snapshot").start()
    try:
        await client.call(snapshot.SNAPSHOT_REMOVE, snapshot.SnapshotRequest(key="a"), timeout=20)
    except ResourceExhausted:
        await asyncio.to_thread(empty, place)
        await client.call(snapshot.SNAPSHOT_REMOVE, snapshot.SnapshotRequest(key="a"), timeout=20)
    assert await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()) == []


READER = """
import sys
from pathlib import Path
from shoal_bus.database import Database
from shoal_bus.errors import from_exception

databases = [Database(Path(sys.argv[1]), "node") for _ in range(2)]
with databases[0].write() as tx:
    tx.execute("CREATE TABLE t (x)")
    tx.execute("INSERT INTO t VALUES (1)")
print("written", flush=True)
for line in sys.stdin:
    for database in databases:
        print(database.read_one("SELECT count(*) FROM t")[0])
        try:
            with database.write() as tx:
                tx.execute("INSERT INTO t VALUES (randomblob(9000))")
            print("wrote")
        except Exception as error:
            print(from_exception(error).code.name)
    print("end", flush=True)
"""
"""Two copies of a service on one database: what they note in its index is changed by the first look and the first write
after each line."""


def test_who_reads_on_a_full_disk_lives(place: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(place / "d" / "d.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "written\n"
        for disk in ("full", "still full", "empty"):
            fill(place) if disk != "empty" else empty(place)
            reader.stdin.write("\n")
            reader.stdin.flush()
            found = [line for _, line in zip(range(5), reader.stdout, strict=False)]
            assert len(found) == 5, f"{found}: killed by signal {-reader.wait(20)}"
            assert found[0] == "1\n"
            expected = "wrote\n" if disk == "empty" else "RESOURCE_EXHAUSTED\n"
            assert (found[1], found[3]) == (expected, expected), disk
        reader.stdin.close()
        assert reader.wait(20) == 0


def test_the_index_of_a_database_is_changed_in_place_and_nothing_else_is(place: Path) -> None:
    database = Database(place / "d" / "d.db", "node")
    try:
        flags = dict(
            line.split(maxsplit=1)[::-1]
            for line in subprocess.run(["lsattr", "-a", place / "d"], check=True, capture_output=True, text=True)
            .stdout.splitlines()
        )  # fmt: skip
    finally:
        database.close()
    is_btrfs = subprocess.run(
        ["stat", "-f", "-c", "%T", place], check=True, capture_output=True, text=True
    ).stdout == "btrfs\n"  # fmt: skip
    found = {Path(path).name for path, flag in flags.items() if "C" in flag}
    assert found == ({"d.db-shm"} if is_btrfs else set())
