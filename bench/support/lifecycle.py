"""Whole life cycles: how many a second, and where the time of one goes."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from shoal_bus.api import runtime as api

from bench.support import raw
from bench.support.effort import Effort
from bench.support.figures import Row, compare
from bench.support.side import Side
from bench.support.world import World

CONCURRENCY = (1, 8)
STEP_BY_STEP, FUSED = 2.0, 3.0
"""The budget: how many times containerd's rate."""
_NUMBERS = itertools.count()


def new_id() -> str:
    return f"c{next(_NUMBERS):06d}"


class Steps:
    """Seconds that each step took, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    async def take(self, name: str, step: Awaitable[Any]) -> Any:
        """Does a step, and notes how long it took."""
        begun = time.perf_counter()
        result = await step
        self.seconds[name].append(time.perf_counter() - begun)
        return result

    def mean_ms(self) -> dict[str, float]:
        return {name: statistics.mean(seconds) * 1000 for name, seconds in self.seconds.items()}


async def lifecycle(side: Side, steps: Steps) -> None:
    """One container from nothing to nothing, a request for each step."""
    id = new_id()
    mounts = await steps.take("snapshot prepare", side.snapshot_prepare(id))
    await steps.take("container create", side.container_create(id, ["true"]))
    await steps.take("task create", side.task_create(id, mounts))
    await steps.take("task start", side.task_start(id))
    status = await steps.take("task wait", side.task_wait(id))
    await steps.take("task delete", side.task_delete(id))
    await steps.take("container delete", side.container_delete(id))
    await steps.take("snapshot remove", side.snapshot_remove(id))
    if status != 0:
        raise RuntimeError(f"{side.name}: `true` exited with {status}")


class FusedRuns:
    """shoal's `runtime.task.run`, removed at its exit; it is over when the last of it, its snapshot, is gone."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._gone: dict[str, asyncio.Event] = {}

    @classmethod
    @asynccontextmanager
    async def of(cls, world: World) -> AsyncIterator[FusedRuns]:
        runs = cls(world)
        async with world.shoal.events("snapshot", "/snapshot/remove") as events:

            async def follow() -> None:
                async for _, event in events:
                    if event.id in runs._gone:
                        runs._gone[event.id].set()

            following = asyncio.create_task(follow())
            try:
                yield runs
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def one(self, steps: Steps) -> None:
        id, client, runtime = new_id(), self._world.shoal.client, self._world.shoal.runtime
        gone = self._gone[id] = asyncio.Event()
        spec = self._world.shoal.spec(id, ["true"])
        request = api.RunTask(id=id, image=self._world.reference, spec=spec, runtime=runtime, remove=True)
        await steps.take("run", client.operate(api.TASK_RUN, request, timeout=60))
        status = await steps.take("wait", self._world.shoal.task_wait(id))
        async with asyncio.timeout(60):
            await steps.take("removed", gone.wait())
        del self._gone[id]
        if status != 0:
            raise RuntimeError(f"shoal: `true` exited with {status}")


async def rate(one: Callable[[], Awaitable[None]], *, seconds: float, concurrency: int) -> float:
    """How many times a second `one` is done by so many workers: as many as begin within `seconds`, over the whole time.

    The time ends with the last one; what is begun is finished.
    """
    begun = time.perf_counter()
    done = 0

    async def worker() -> None:
        nonlocal done
        while time.perf_counter() - begun < seconds:
            await one()
            done += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return done / (time.perf_counter() - begun)


async def measure(world: World, effort: Effort, *, runtime: str = "runc") -> list[Row]:
    """Rates of both sides step by step, of shoal's fused run, and of the runtime alone, all in turn."""
    for side in world.sides:
        side.runtime = runtime
    rows = []
    try:
        async with FusedRuns.of(world) as runs:
            for concurrency in CONCURRENCY:
                rows += await _measure(world, effort, runs, f"{concurrency} at once, {runtime}", runtime, concurrency)
            with world.with_seccomp():
                rows += await _measure(world, effort, runs, f"1 at once, {runtime}, seccomp", runtime, 1)
    finally:
        for side in world.sides:
            side.runtime = "runc"
    return rows


async def _measure(
    world: World, effort: Effort, runs: FusedRuns, mark: str, runtime: str, concurrency: int
) -> list[Row]:
    steps = {name: Steps() for name in ("containerd", "shoal", "fused")}
    rates: dict[str, list[float]] = {name: [] for name in (*steps, "raw")}
    todo: dict[str, Callable[[], Awaitable[None]]] = {
        "containerd": lambda: lifecycle(world.containerd, steps["containerd"]),
        "shoal": lambda: lifecycle(world.shoal, steps["shoal"]),
        "fused": lambda: runs.one(steps["fused"]),
    }
    for one in todo.values():
        await one()  # what is cold the first time
    for taken in steps.values():
        taken.seconds.clear()
    for number in range(effort.rounds):
        for name, one in todo.items():
            rates[name].append(await rate(one, seconds=effort.seconds, concurrency=concurrency))
        work = world.scratch.directory / f"raw-{mark.replace(', ', '-').replace(' ', '-')}-{number}"
        alone, raw_steps = await asyncio.to_thread(
            raw.measure, runtime, world.template, world.rootfs, work, world.scratch.mark,
            seconds=effort.seconds, concurrency=concurrency,
        )  # fmt: skip
        rates["raw"].append(alone)
    world.steps |= {f"{name}, {mark}": taken.mean_ms() for name, taken in steps.items()}
    world.steps[f"{runtime} alone, {mark}"] = raw_steps
    containerd = rates["containerd"]
    return [
        compare(
            f"lifecycles, {mark}", "1/s", containerd, rates["shoal"], higher_is_better=True, budget=STEP_BY_STEP
        ),
        compare(f"fused runs, {mark}", "1/s", containerd, rates["fused"], higher_is_better=True, budget=FUSED),
        compare(
            f"{runtime} alone, {mark}", "1/s", containerd, rates["raw"], higher_is_better=True,
            note="the limit: no supervisor, snapshot or record",
        ),
    ]  # fmt: skip
