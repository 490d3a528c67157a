"""What supervision and an idle control plane take of memory: proportional set sizes, as the kernel counts them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from bench.support.effort import Effort
from bench.support.figures import Row, compare
from bench.support.lifecycle import new_id
from bench.support.side import Side
from bench.support.world import World

PER_CONTAINER = 4.0
"""The budget: a quarter of containerd's."""
_AT_ONCE = 8
_SETTLE_SECONDS = 2.0


def pss(pids: Sequence[int]) -> float:
    """MiB of all of these processes together: a page that several have is divided between them (proc(5), smaps)."""
    return sum(_field(pid, "smaps_rollup", "Pss") for pid in pids) / 1024


def rss(pids: Sequence[int]) -> float:
    """MiB of all of these processes, shared pages counted in each."""
    return sum(_field(pid, "status", "VmRSS") for pid in pids) / 1024


def _field(pid: int, file: str, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0  # gone meanwhile
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


async def measure(world: World, effort: Effort) -> list[Row]:
    """The control planes with no container, then with many of them, and what supervises those."""
    count = effort.containers
    await asyncio.sleep(_SETTLE_SECONDS)
    bus = pss(world.shoal.bus())
    idle = {side.name: pss(side.services()) for side in world.sides}
    idle_rss = {side.name: rss(side.services()) for side in world.sides}
    # The zygote is there from the first container on, and stays a moment after the last.
    supervising: dict[str, float] = {}
    busy: dict[str, float] = {}
    for side in world.sides:
        ids = [new_id() for _ in range(count)]
        try:
            await _each(ids, lambda id, side=side: _start(side, id))  # type: ignore[misc]
            await asyncio.sleep(_SETTLE_SECONDS)
            supervisors = side.supervisors()
            if len(supervisors) < count:
                raise RuntimeError(f"{side.name}: {len(supervisors)} processes supervise {count} containers")
            supervising[side.name] = pss(supervisors) / count
            busy[side.name] = pss(side.services())
        finally:
            await _each(ids, lambda id, side=side: _end(side, id))  # type: ignore[misc]
    whole = {name: busy[name] + supervising[name] * count for name in busy}
    return [
        _row(f"supervision of each of {count}, PSS", supervising, budget=PER_CONTAINER, note="shims, and the zygote"),
        _row("services, 0 containers, PSS", idle, note=f"{bus:.1f} of shoal's is its nats-server"),
        _row("services, 0 containers, RSS", idle_rss),
        _row(
            "the same, and containerd with a nats-server, PSS",
            {"containerd": idle["containerd"] + bus, "shoal": idle["shoal"]},
        ),
        _row(f"services, {count} containers, PSS", busy),
        _row(f"services and supervision, {count} containers, PSS", whole),
        _row(
            f"the same beyond 0 containers, for each of {count}, PSS",
            {name: (whole[name] - idle[name]) / count for name in whole},
            budget=PER_CONTAINER,
        ),
    ]


def _row(name: str, of: dict[str, float], *, budget: float | None = None, note: str = "") -> Row:
    return compare(name, "MiB", [of["containerd"]], [of["shoal"]], budget=budget, note=note)


async def _each(ids: Sequence[str], do: Callable[[str], Awaitable[None]]) -> None:
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(id: str) -> None:
        async with slots:
            await do(id)

    await asyncio.gather(*(one(id) for id in ids))


async def _start(side: Side, id: str) -> None:
    mounts = await side.snapshot_prepare(id)
    await side.container_create(id, ["sleep", "3600"])
    await side.task_create(id, mounts)
    await side.task_start(id)


async def _end(side: Side, id: str) -> None:
    await side.task_kill(id)
    await side.task_wait(id)
    await side.task_delete(id)
    await side.container_delete(id)
    await side.snapshot_remove(id)
