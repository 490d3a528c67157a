"""Turns: so many at a time, and nobody waits for ever for those who wait for him."""

from __future__ import annotations

import asyncio

import pytest
from shoal_runtime import turns
from shoal_runtime.turns import Turns


async def test_so_many_at_a_time_have_their_turn() -> None:
    waiting, now, most = Turns(3), 0, 0

    async def work() -> None:
        nonlocal now, most
        async with waiting.turn():
            now += 1
            most = max(most, now)
            await asyncio.sleep(0)
            now -= 1

    await asyncio.gather(*(work() for _ in range(20)))
    assert (now, most) == (0, 3)


async def test_one_that_waits_for_another_does_not_keep_it_from_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_STUCK_SECONDS", 0.05)
    waiting, come = Turns(2), asyncio.Event()

    async def stuck() -> None:
        async with waiting.turn():
            await come.wait()

    async def next_one() -> None:
        async with waiting.turn():
            come.set()

    async with asyncio.timeout(10):
        await asyncio.gather(stuck(), stuck(), next_one())
    async with asyncio.timeout(10), waiting.turn(), waiting.turn():
        pass  # both places are free again


async def test_who_gives_up_waiting_takes_no_place_with_him() -> None:
    waiting = Turns(1)
    async with waiting.turn():
        given_up = asyncio.create_task(waiting.turn().__aenter__())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
    async with asyncio.timeout(1), waiting.turn():
        pass
