"""The scrub's pass in the background, on a real store: slow, in turn with other copies', from where it stopped."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from shoal_bus.database import Database
from shoal_bus.locks import Locks
from shoal_content.blobs.layout import Layout
from shoal_content.blobs.scrub import Scrub, _step_back
from shoal_content.blobs.store import Store
from shoal_content.schema import MIGRATIONS

SIZE = 1 << 20


@dataclass
class Place:
    """A store of four blobs of one MiB, by digest."""

    database: Database
    layout: Layout
    store: Store
    locks: Locks
    digests: list[str]

    def scrub(self, *, every: float = 1000.0, rate: float = 0.0) -> Scrub:
        return Scrub(self.database, self.layout, self.store, self.locks, every=every, rate=rate)

    def damage(self, number: int) -> None:
        with self.layout.path(self.digests[number]).open("r+b") as file:
            file.write(b"damaged")

    def rotten(self) -> list[str]:
        return [row["digest"] for row in self.database.read("SELECT digest FROM rotten ORDER BY digest")]

    def position(self) -> str:
        row = self.database.read_one("SELECT position FROM scrub")
        return str(row["position"]) if row is not None else ""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    database = Database(tmp_path / "metadata.db", "node", MIGRATIONS, service="content")
    layout = Layout(tmp_path / "content")
    store, locks = Store(database, layout), Locks(tmp_path / "locks")
    digests = []
    for number in range(4):
        data = os.urandom(SIZE - 1) + bytes([number])
        file = layout.ingest(str(number))
        file.write_bytes(data)
        digests.append("sha256:" + hashlib.sha256(data).hexdigest())
        with database.write() as tx:
            store.add(tx, "default", file, digests[-1], SIZE, {})
        file.unlink()
    yield Place(database, layout, store, locks, sorted(digests))
    locks.close()
    database.close()


async def test_first_pass_is_due_a_while_after_the_first_start(place: Place) -> None:
    assert not place.scrub().due()
    assert not place.scrub().due()
    assert place.scrub(every=0.0).due()
    await place.scrub(every=0.0).go_on()
    assert not place.scrub().due()


async def test_pass_that_was_stopped_goes_on_where_it_was(place: Place) -> None:
    slow = asyncio.create_task(place.scrub(rate=4 * SIZE).go_on())
    async with asyncio.timeout(10):
        while place.position() != place.digests[1]:
            await asyncio.sleep(0.01)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    for number in (0, 3):
        place.damage(number)
    assert place.scrub().due()
    await place.scrub().go_on()
    assert place.rotten() == [place.digests[3]]  # the other one's turn is in the next pass
    assert place.position() == ""
    await place.scrub().go_on()
    assert place.rotten() == [place.digests[0], place.digests[3]]


async def test_pass_keeps_to_its_rate(place: Place) -> None:
    began = time.monotonic()
    await place.scrub(rate=8 * SIZE).go_on()
    assert time.monotonic() - began > 0.9 * len(place.digests) / 8


async def test_what_is_read_is_not_condemned_if_it_is_another_file_by_then(place: Place) -> None:
    """Healed, or removed, between being read and being told of."""
    scrub, healed, removed = place.scrub(), place.digests[0], place.digests[1]
    data = place.layout.path(healed).read_bytes()
    for number in (0, 1):
        place.damage(number)
    reads = {digest: await asyncio.to_thread(_read, scrub, digest) for digest in (healed, removed)}
    assert all(read.problem for read in reads.values())
    place.layout.path(healed).unlink()
    place.layout.path(healed).write_bytes(data)
    with place.database.write() as tx:
        place.store.hide(tx, "default", removed)
    place.store.purge()
    with place.database.write() as tx:
        assert [scrub.condemn(tx, digest, read) for digest, read in reads.items()] == [False, False]
    scrub.set_aside()
    assert place.layout.path(healed).read_bytes() == data
    assert list(place.layout.quarantined.iterdir()) == []


def _read(scrub: Scrub, digest: str) -> Any:
    return scrub._read(digest, SIZE, 0.0, threading.Event(), [0])


def test_pass_lets_everybody_else_on_the_machine_go_first() -> None:
    """ionice(1) and the kernel say of the thread what it said of itself; ours stays as it was."""

    def priorities() -> tuple[int, str]:
        told = subprocess.run(["ionice", "-p", str(threading.get_native_id())], capture_output=True, check=True)
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), told.stdout.decode().strip()

    before = os.getpriority(os.PRIO_PROCESS, 0)
    with ThreadPoolExecutor(1, initializer=_step_back) as thread:
        assert thread.submit(priorities).result() == (19, "idle")
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


async def test_death_between_the_record_and_the_quarantine_is_made_up_for_at_the_start(place: Place) -> None:
    scrub = place.scrub()
    place.damage(2)
    with place.database.write() as tx:
        scrub.condemn(tx, place.digests[2], _read(scrub, place.digests[2]))
    assert place.layout.path(place.digests[2]).exists()  # dead here
    place.scrub().set_aside()
    assert not place.layout.path(place.digests[2]).exists()
    assert len(list(place.layout.quarantined.iterdir())) == 1


async def test_death_there_and_a_heal_before_the_next_start_keeps_both(place: Place) -> None:
    scrub, digest = place.scrub(), place.digests[2]
    data = place.layout.path(digest).read_bytes()
    place.damage(2)
    with place.database.write() as tx:
        scrub.condemn(tx, digest, _read(scrub, digest))
    file = place.layout.ingest("again")
    file.write_bytes(data)
    with place.database.write() as tx:
        place.store.add(tx, "default", file, digest, SIZE, {})
    place.scrub().set_aside()
    assert place.layout.path(digest).read_bytes() == data
    assert place.rotten() == []
    assert len(list(place.layout.quarantined.iterdir())) == 1
