"""The two command lines, end to end: a process started, what it does, its end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable

from bench.support.effort import Effort
from bench.support.figures import Row, compare
from bench.support.lifecycle import new_id
from bench.support.shoal import BINARY, installed
from bench.support.world import World

RUN, VERSION_MS = 1.0, 100.0
"""The budget: `shoal run --rm` no slower than `ctr run --rm`, and how long `shoal version` may take."""


async def measure(world: World, effort: Effort) -> list[Row]:
    """`run --rm` of `true`, and `version`, one after the other and in turn."""
    return await asyncio.to_thread(_measure, world, effort)


def _measure(world: World, effort: Effort) -> list[Row]:
    daemon, mark = world.containerd.daemon, world.scratch.mark
    ctr = ["ctr", "--address", str(daemon.address), "--namespace", mark]
    # The default seccomp profile, which shoal gives each container, ctr gives where it is asked to.
    options = ["--rm", "--runc-root", str(daemon.state / "oci"), "--seccomp"]
    shoal = installed()
    environment = world.shoal.node.environment | {"SHOAL_NAMESPACE": mark}
    note = "" if shoal[0] == str(BINARY) else "shoal by `python -m shoal_cli`: run `make binaries` first"
    count = max(5, effort.samples // 10)

    def of(*commands: Callable[[], list[str]]) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in commands]
        for command in commands:
            _time(command(), environment)
        for _ in range(count):
            for values, command in zip(times, commands, strict=True):
                values.append(_time(command(), environment))
        return times

    runs = of(
        lambda: [*ctr, "run", *options, world.reference, new_id(), "true"],
        lambda: [*shoal, "run", "--rm", "--name", new_id(), world.reference, "true"],
    )
    versions = of(lambda: [*ctr, "version"], lambda: [*shoal, "version"])
    return [
        compare("run --rm, end to end", "ms", runs[0], runs[1], budget=RUN, note=note),
        compare("version, end to end", "ms", versions[0], versions[1], limit=VERSION_MS, note=note),
    ]


def _time(command: list[str], environment: dict[str, str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=os.sep
    )
    took = (time.perf_counter() - begun) * 1000
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exited with {done.returncode}: {done.stderr.strip()}")
    return took
