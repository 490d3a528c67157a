"""containerd's API: shoal's gateway beside Debian's containerd, by the same clients, in one run and in turn.

    make bench                                       with the others, some minutes
    .venv/bin/python bench/gateway.py --quick        everything, two minutes
    .venv/bin/python bench/gateway.py --only lives --profile

As root. docs/benchmarks.md says what each figure is.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.support import ctr, effort, figures, lives, memory, requests, sockets
from bench.support.scratch import scratch

RESULTS = Path(__file__).resolve().parent.parent / "build/bench/gateway.json"
MEASURES = {
    "memory": memory.measure,  # first: what a service has used, it keeps
    "requests": requests.measure,
    "ctr": ctr.measure,
    "lives": lives.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes: fewer rounds, rougher figures")
    parser.add_argument("--only", action="append", choices=MEASURES, metavar="NAME", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--profile", action="store_true", help="say where the time of a life cycle goes, by step")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("must run as root: file systems are mounted and containers run")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(interruptible(options))
    except asyncio.CancelledError:
        print("interrupted; everything is undone", file=sys.stderr)
        return 130


async def interruptible(options: argparse.Namespace) -> int:
    """Runs it; the first signal ends it, and no further one keeps it from undoing what it did."""
    measuring = asyncio.create_task(run(options))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, measuring)
    return await measuring


def stop(measuring: asyncio.Task[int]) -> None:
    if not measuring.cancelling():
        measuring.cancel()


async def run(options: argparse.Namespace) -> int:
    rows = []
    begun = time.monotonic()
    with scratch() as place:
        async with sockets.opened(place) as both:
            for name in options.only or MEASURES:
                print(f"-- {name} …", file=sys.stderr, flush=True)
                rows += await MEASURES[name](both, effort.QUICK if options.quick else effort.FULL)
    print(figures.table(rows))
    if options.profile and both.steps:
        print(f"\nmean milliseconds of each step\n{figures.steps_table(both.steps)}")
    figures.write(options.json, rows, both.steps, both.notes, quick=options.quick)
    print(f"\n{time.monotonic() - begun:.0f} s; all of it: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
