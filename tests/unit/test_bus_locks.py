"""Locks between copies: held once, waited for in order, gone with their holder."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shoal_bus.admission import Slot
from shoal_bus.locks import Locks

_HOLDER = """
import sys, time
from pathlib import Path
from shoal_bus.locks import Locks
locks = Locks(Path(sys.argv[1]))
assert locks.try_acquire("key")
print("held", flush=True)
time.sleep(60)
"""


async def test_lock_is_held_once_by_two_copies(tmp_path: Path) -> None:
    one, two = Locks(tmp_path / "l"), Locks(tmp_path / "l")
    assert one.try_acquire("a")
    assert not one.try_acquire("a")
    assert not two.try_acquire("a")
    assert two.try_acquire("b")
    waiting = asyncio.create_task(two.acquire("a"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    one.release("a")
    async with asyncio.timeout(2):
        await waiting
    assert not one.try_acquire("a")
    two.close()
    assert one.try_acquire("a")
    one.close()


async def test_cancelled_waiters_leave_nothing_behind(tmp_path: Path) -> None:
    one, two = Locks(tmp_path / "l"), Locks(tmp_path / "l")
    assert one.try_acquire("a")
    waiters = [asyncio.create_task(locks.acquire("a")) for locks in (one, two) for _ in range(5)]
    await asyncio.sleep(0.02)
    for task in waiters:
        task.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    one.release("a")
    assert two.try_acquire("a")
    two.release("a")
    assert not one._waiting
    assert not two._waiting
    one.close()
    two.close()


async def test_turn_that_comes_to_a_cancelled_waiter_goes_to_the_next(tmp_path: Path) -> None:
    locks = Locks(tmp_path / "l")
    await locks.acquire("a")
    first, second = (asyncio.create_task(locks.acquire("a")) for _ in range(2))
    await asyncio.sleep(0)
    locks.release("a")  # it is the first one's turn now
    first.cancel()
    async with asyncio.timeout(2):
        await second
    locks.release("a")
    assert not locks._waiting
    locks.close()


async def test_many_keys_exclude_each_for_itself(tmp_path: Path) -> None:
    copies = [Locks(tmp_path / "l") for _ in range(3)]
    inside: dict[str, int] = {}

    async def work(locks: Locks, key: str) -> None:
        async with locks.hold(key):
            inside[key] = inside.get(key, 0) + 1
            assert inside[key] == 1
            await asyncio.sleep(0.001)
            inside[key] -= 1

    await asyncio.gather(*(work(copies[n % 3], f"key {n % 40}") for n in range(400)))
    for locks in copies:
        locks.close()


def test_lock_of_a_killed_process_is_free_also_while_its_child_lives(tmp_path: Path) -> None:
    forks = _HOLDER.replace('print("held"', 'import os\nif not os.fork(): time.sleep(60)\nprint("held"')
    holder = subprocess.Popen(
        [sys.executable, "-c", forks, str(tmp_path / "l")], stdout=subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        locks = Locks(tmp_path / "l")
        assert not locks.try_acquire("key")
        holder.kill()
        holder.wait()
        ends = time.monotonic() + 5
        while not locks.try_acquire("key"):
            assert time.monotonic() < ends
            time.sleep(0.01)
        locks.close()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
        holder.wait()


async def test_slot_is_free_for_others_while_its_holder_waits() -> None:
    slots = asyncio.Semaphore(1)
    async with Slot(slots) as slot:
        assert slots.locked()
        async with slot.away():
            async with slot.away():
                assert not slots.locked()
            assert not slots.locked()
        assert slots.locked()
    assert not slots.locked()


async def test_slot_cancelled_while_away_is_not_given_back_twice() -> None:
    slots = asyncio.Semaphore(1)

    async def leave() -> None:
        async with Slot(slots) as slot, slot.away():
            await asyncio.sleep(60)

    task = asyncio.create_task(leave())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    async with Slot(slots):
        task.cancel()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slots.locked()
    assert slots._value == 1
