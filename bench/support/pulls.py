"""Pulls: both command lines, a process from its start to its end, and the memory of what works meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bench.support.effort import Effort
from bench.support.figures import Row, compare
from bench.support.fresh import SIDES, Fresh
from bench.support.layered import SAMPLES, Sample, push_samples
from bench.support.memory import pss
from bench.support.scratch import Scratch
from tests.support import registry

TIME, PEAK_MIB = 4.0, 150.0
"""The budget: a quarter of the time, and what shoal may take of memory whatever the image's size."""
_SAMPLE_SECONDS = 0.03


def measure(scratch: Scratch, effort: Effort) -> list[Row]:
    """Each image pulled and unpacked by both in turn; then once more by each, its memory being watched."""
    rows = []
    with registry.running(scratch.directory / "registry") as served:
        push_samples(served.host)
        for sample in SAMPLES:
            reference = sample.reference(served.host)
            times: dict[str, list[float]] = {"containerd": [], "shoal": []}
            for _ in range(effort.rounds):
                for opened in SIDES:
                    with opened(scratch) as side:
                        times[side.name].append(_pull(side, sample, reference))
            rows.append(compare(f"pull, {sample.name}", "s", times["containerd"], times["shoal"], budget=TIME))
            peaks = {}
            for opened in SIDES:
                with opened(scratch) as side, watched(side) as peak:
                    _pull(side, sample, reference)
                peaks[side.name] = peak.mib
            rows.append(_peak_row(peaks))
    return rows


def _peak_row(peaks: dict[str, float]) -> Row:
    name, note = "  its peak memory, PSS", "content, snapshot and its workers"
    return compare(name, "MiB", [peaks["containerd"]], [peaks["shoal"]], limit=PEAK_MIB, note=note)


def _pull(side: Fresh, sample: Sample, reference: str) -> float:
    side.forget_caches()
    took = side.command(side.pull_command(reference))
    found = side.files()
    if found < sample.files:
        raise RuntimeError(f"{side.name}: unpacked {found} of the {sample.files} files of {reference}")
    return took


class Peak:
    """The most memory there was."""

    mib = 0.0


@contextmanager
def watched(side: Fresh) -> Iterator[Peak]:
    """Samples what the processes that pull and unpack take of memory while the block lasts."""
    peak, over = Peak(), threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            peak.mib = max(peak.mib, pss(side.storing()))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield peak
    finally:
        over.set()
        watching.join()
