"""The life cycles once more, with crun on both sides."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bench.support import lifecycle, raw
from bench.support.effort import Effort
from bench.support.figures import Row
from bench.support.world import World

_CONTROLLERS = Path("/sys/fs/cgroup/unified/cgroup.controllers")
"""What cgroup v2 has to itself beside v1 (the "hybrid" set-up)."""


async def measure(world: World, effort: Effort) -> list[Row]:
    """The same rows as for runc; none, and a word on why, where crun can't run a container on this machine."""
    if shutil.which("crun") is None:
        world.notes.append("crun left out: it isn't installed (apt-get install crun)")
        return []
    with ExitStack() as stack:
        if _CONTROLLERS.exists() and _CONTROLLERS.read_text().split() == ["hugetlb"]:
            stack.enter_context(_hugetlb_in_v1(world))
        work = world.scratch.directory / "raw-crun-probe"
        try:
            await asyncio.to_thread(
                raw.measure, "crun", world.template, world.rootfs, work, world.scratch.mark, seconds=0.0, concurrency=1
            )
        except RuntimeError as error:
            world.notes.append(f"crun left out: it can't run a container on this machine: {error}")
            return []
        return await lifecycle.measure(world, effort, runtime="crun")


@contextmanager
def _hugetlb_in_v1(world: World) -> Iterator[None]:
    """crun before 1.9 wants cgroup v2 without a controller where there is v1 as well: this one goes to v1 meanwhile."""
    place = world.scratch.directory / "hugetlb"
    place.mkdir()
    subprocess.run(["mount", "-t", "cgroup", "-o", "hugetlb", "cgroup", str(place)], check=True)
    try:
        yield
    finally:
        with suppress(OSError):
            (place / world.scratch.mark).rmdir()
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()
