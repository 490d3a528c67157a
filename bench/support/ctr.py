"""Debian's `ctr` against both sockets, end to end: a process started, what it does, its end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time

from bench.support.containerd import Containerd
from bench.support.effort import Effort
from bench.support.figures import Row, compare
from bench.support.lifecycle import new_id
from bench.support.sockets import Sockets

RUN = 1 / 0.6
"""The budget: at most 0.6 of the time."""


async def measure(both: Sockets, effort: Effort) -> list[Row]:
    """`run --rm` of `true`; `run -d` and the removal; one after the other and in turn."""
    return await asyncio.to_thread(_measure, both, effort)


def _measure(both: Sockets, effort: Effort) -> list[Row]:
    count = max(9, effort.samples // 5)
    rows = []
    for name, one, budget in (("ctr run --rm", _run, RUN), ("ctr run -d, task rm -f, container rm", _detached, None)):
        times: dict[str, list[float]] = {side.name: [] for side in both.sides}
        for side in both.sides:
            one(side, both.reference)  # what is cold the first time
        for _ in range(count):
            for side in both.sides:
                times[side.name].append(one(side, both.reference))
        rows.append(compare(f"{name}, end to end", "ms", times["containerd"], times["shoal"], budget=budget))
    return rows


def _run(side: Containerd, reference: str) -> float:
    return _timed(side, ["run", "--rm", "--runc-root", _oci(side), reference, new_id(), "true"])


def _detached(side: Containerd, reference: str) -> float:
    id = new_id()
    return _timed(
        side,
        ["run", "-d", "--null-io", "--runc-root", _oci(side), reference, id, "sleep", "3600"],
        ["task", "rm", "-f", id],
        ["container", "rm", id],
    )


def _oci(side: Containerd) -> str:
    return str(side.daemon.state / "oci")


def _timed(side: Containerd, *commands: list[str]) -> float:
    """Milliseconds of these one after the other."""
    begun = time.perf_counter()
    for command in commands:
        done = subprocess.run(
            ["ctr", "--address", str(side.daemon.address), "--namespace", side.namespace, *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=os.sep,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{side.name}: ctr {' '.join(command)}: {done.stderr.strip()}")
    return (time.perf_counter() - begun) * 1000
