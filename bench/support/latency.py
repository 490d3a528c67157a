"""How long single steps take, and how long after an exit a subscriber is told of it."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.support.effort import Effort
from bench.support.figures import Row, percentile, whole
from bench.support.lifecycle import new_id
from bench.support.side import Side
from bench.support.world import World

EXIT_TO_EVENT_MS = 5.0
"""The budget, at the median."""
_EVENT_SECONDS = 20.0
_SLEEP = ["sleep", "600"]
CREATE, START, EXIT, EXEC = "create", "start", "exit to event", "exec"
"""`create` and `start` are one request each; an exec is three: create, start, wait of `true`."""


class Exits:
    """When a subscriber was told of the exits it was asked to look out for."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], asyncio.Future[float]] = {}

    @classmethod
    @asynccontextmanager
    async def of(cls, side: Side) -> AsyncIterator[Exits]:
        exits = cls()
        async with side.exits() as events:

            async def follow() -> None:
                async for event in events:
                    told = exits._told.pop((event.container_id, event.exec_id), None)
                    if told is not None and not told.done():
                        told.set_result(event.received)

            following = asyncio.create_task(follow())
            try:
                yield exits
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    def expect(self, id: str, exec_id: str = "") -> asyncio.Future[float]:
        told = asyncio.get_running_loop().create_future()
        self._told[id, exec_id] = told
        return told


async def measure(world: World, effort: Effort) -> list[Row]:
    """Medians and 99th percentiles, one request at a time, each side in turn."""
    samples: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    each = max(2, effort.samples // effort.rounds)
    async with Exits.of(world.containerd) as theirs, Exits.of(world.shoal) as ours:
        for side, exits in ((world.containerd, theirs), (world.shoal, ours)):
            await _samples(side, exits, 2)  # what is cold the first time
        for _ in range(effort.rounds):
            for side, exits in ((world.containerd, theirs), (world.shoal, ours)):
                for name, values in (await _samples(side, exits, each)).items():
                    samples[name][side.name].append(values)
    rows = []
    for name in (CREATE, START, EXEC, EXIT):
        limit = EXIT_TO_EVENT_MS if name == EXIT else None
        rows.append(_row(f"{name}, median", samples[name], statistics.median, limit))
        rows.append(_row(f"{name}, p99", samples[name], lambda values: percentile(values, 99), None))
    return rows


def _row(name: str, samples: dict[str, list[list[float]]], of: object, limit: float | None) -> Row:
    assert callable(of)
    figures = {side: of([value for values in rounds for value in values]) for side, rounds in samples.items()}
    rounds = {side: [of(values) for values in rounds] for side, rounds in samples.items()}
    return whole(name, "ms", figures, rounds, limit=limit)


async def _samples(side: Side, exits: Exits, count: int) -> dict[str, list[float]]:
    """Milliseconds of so many of each."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(count):
        id = new_id()
        mounts = await side.snapshot_prepare(id)
        await side.container_create(id, _SLEEP)
        begun = time.perf_counter()
        pid = await side.task_create(id, mounts)
        found[CREATE].append(_since(begun))
        begun = time.perf_counter()
        await side.task_start(id)
        found[START].append(_since(begun))
        found[EXEC].append(await _exec(side, id))
        found[EXIT].append(await _exit(side, exits, id, pid))
        await side.task_delete(id)
        await side.container_delete(id)
        await side.snapshot_remove(id)
    return found


async def _exec(side: Side, id: str) -> float:
    begun = time.perf_counter()
    await side.exec_create(id, "probe", ["true"])
    await side.exec_start(id, "probe")
    status = await side.exec_wait(id, "probe")
    took = _since(begun)
    await side.exec_delete(id, "probe")
    if status != 0:
        raise RuntimeError(f"{side.name}: an exec of `true` exited with {status}")
    return took


async def _exit(side: Side, exits: Exits, id: str, pid: int) -> float:
    """From SIGKILL, sent by us to the container's first process itself, to the event in a subscriber's hands.

    So the kernel's tearing down of the process is in it, and no request is.
    """
    told = exits.expect(id)
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(_EVENT_SECONDS):
        took = (await told - begun) * 1000
    await side.task_wait(id)
    return took


def _since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000
