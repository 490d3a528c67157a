"""A benchmark's run: both sides opened, measured in turn, told, and undone whatever happens."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import uvloop

from bench.support import effort, figures
from bench.support.effort import Effort
from bench.support.figures import Row
from bench.support.scratch import Scratch, scratch

RESULTS = Path(__file__).resolve().parents[2] / "build/bench"


class Sides(Protocol):
    """Both, opened."""

    steps: dict[str, Any]
    notes: list[str]


S = TypeVar("S", bound=Sides)


def main(
    what: str,
    results: str,
    opened: Callable[[Scratch], AbstractAsyncContextManager[S]],
    measures: Mapping[str, Callable[[S, Effort], Awaitable[list[Row]]]],
) -> int:
    """Runs `measures` on what `opened` opens, and writes all of it to `build/bench/<results>.json`. The exit status."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher figures")
    parser.add_argument("--only", action="append", choices=measures, metavar="NAME", help=f"of {', '.join(measures)}")
    parser.add_argument("--profile", action="store_true", help="say where the time of a life cycle goes, by step")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{results}.json", metavar="PATH")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("must run as root: file systems are mounted and containers run")
    try:
        # The client of either side shares the processors with what it measures: the lighter its loop, the better.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_interruptible(_run(options, opened, measures)))
    except asyncio.CancelledError:
        print("interrupted; everything is undone", file=sys.stderr)
        return 130


async def _interruptible(measuring: Any) -> int:
    """The first signal ends it, and no further one keeps it from undoing what it did."""
    task: asyncio.Task[int] = asyncio.create_task(measuring)

    def stop() -> None:
        if not task.cancelling():
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return await task


async def _run(
    options: argparse.Namespace,
    opened: Callable[[Scratch], AbstractAsyncContextManager[S]],
    measures: Mapping[str, Callable[[S, Effort], Awaitable[list[Row]]]],
) -> int:
    rows: list[Row] = []
    begun = time.monotonic()
    with scratch() as place:
        async with opened(place) as both:
            for name in options.only or measures:
                print(f"-- {name} …", file=sys.stderr, flush=True)
                rows += await measures[name](both, effort.QUICK if options.quick else effort.FULL)
    print(figures.table(rows))
    if options.profile and both.steps:
        print(f"\nmean milliseconds of each step\n{figures.steps_table(both.steps)}")
    for note in both.notes:
        print(f"\n{note}")
    figures.write(options.json, rows, both.steps, both.notes, quick=options.quick)
    print(f"\n{time.monotonic() - begun:.0f} s; all of it: {options.json}")
    return 0
