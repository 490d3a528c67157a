"""Single requests of containerd's API: a container's record, all of them, and content."""

from __future__ import annotations

import asyncio
import statistics
from collections import defaultdict
from contextlib import ExitStack

from bench.support.effort import Effort
from bench.support.figures import Row, compare, percentile, whole
from bench.support.sockets import Probe, Sockets, probing

CONTAINERS = 1000
GET_MS = 1.0
"""The budget: how long a get may take."""
NO_SLOWER = 1.0
SIZE, RANGES_SIZE = 256 << 20, 8 << 20
_MS = {"get": "a container", "list": f"{CONTAINERS:,} containers"}


async def measure(both: Sockets, effort: Effort) -> list[Row]:
    """Latencies and rates of the same client of each side, one call at a time and in turn."""
    return await asyncio.to_thread(_measure, both, effort)


def _measure(both: Sockets, effort: Effort) -> list[Row]:
    with ExitStack() as stack:
        probes = {side.name: stack.enter_context(probing(side)) for side in both.sides}
        return [*_records(both, probes, effort), *_content(probes, effort)]


def _records(both: Sockets, probes: dict[str, Probe], effort: Effort) -> list[Row]:
    samples = {"get": effort.samples * 10 // effort.rounds, "list": max(5, effort.samples // effort.rounds)}
    taken: dict[str, dict[str, list[list[float]]]] = {name: defaultdict(list) for name in _MS}
    for side in both.sides:
        probes[side.name].ask("create", CONTAINERS, side.spec("probe", ["true"]))
    for probe in probes.values():
        for asked in _MS:
            probe.ask(asked, 3, CONTAINERS)  # what is cold the first time
    for _ in range(effort.rounds):
        for asked, count in samples.items():
            for name, probe in probes.items():
                taken[asked][name].append(probe.ask(asked, count, CONTAINERS))
    for probe in probes.values():
        probe.ask("remove", CONTAINERS)
    rows = []
    for asked, sides in taken.items():
        limit = GET_MS if asked == "get" else None
        for of, figure in (("median", statistics.median), ("p99", lambda values: percentile(values, 99))):
            figures = {name: figure([value for values in rounds for value in values]) for name, rounds in sides.items()}
            rounds = {name: [figure(values) for values in rounds] for name, rounds in sides.items()}
            kept = limit if of == "median" else None
            rows.append(whole(f"{asked} {_MS[asked]}, {of}", "ms", figures, rounds, limit=kept))
    return rows


def _content(probes: dict[str, Probe], effort: Effort) -> list[Row]:
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(effort.rounds):
        digests = {}
        for name, probe in probes.items():
            digests[name], rate = probe.ask("write", f"bench{number}", SIZE)
            rates["write"][name].append(rate)
        for name, probe in probes.items():
            rates["read"][name].append(probe.ask("read", digests[name], SIZE))
        for name, probe in probes.items():
            rates["ranges"][name].append(probe.ask("ranges", digests[name], RANGES_SIZE))
        for name, probe in probes.items():
            probe.ask("forget", digests[name])
    told = {
        "write": "content write, 256 MiB", "read": "content read, 256 MiB", "ranges": "content read, 32 KiB a call",
    }  # fmt: skip
    return [
        compare(
            told[name], "MB/s", sides["containerd"], sides["shoal"], higher_is_better=True, budget=NO_SLOWER
        )
        for name, sides in rates.items()
    ]  # fmt: skip
