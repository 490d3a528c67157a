"""The life cycles once more, with crun on both sides."""

from __future__ import annotations

import asyncio
import shutil

from bench.support import lifecycle, raw
from bench.support.effort import Effort
from bench.support.figures import Row
from bench.support.world import World


async def measure(world: World, effort: Effort) -> list[Row]:
    """The same rows as for runc; none, and a word on why, where crun can't run a container on this machine."""
    if shutil.which("crun") is None:
        world.notes.append("crun left out: it isn't installed (apt-get install crun)")
        return []
    work = world.scratch.directory / "raw-crun-probe"
    try:
        await asyncio.to_thread(
            raw.measure, "crun", world.template, world.rootfs, work, world.scratch.mark, seconds=0.0, concurrency=1
        )
    except RuntimeError as error:
        # crun before 1.9 wants either cgroup v1 or v2, not both at once.
        world.notes.append(f"crun left out: it can't run a container on this machine: {error}")
        return []
    return await lifecycle.measure(world, effort, runtime="crun")
