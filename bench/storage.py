"""Storage, beside Debian's containerd: the same images from the same registry, in one run and in turn.

    make bench                                       with the others, some minutes
    .venv/bin/python bench/storage.py --quick        everything, some minutes
    .venv/bin/python bench/storage.py --only chains

As root. Every run of either side begins on a file system of its own, with a daemon that has done nothing yet and empty
caches. docs/benchmarks.md says what each figure is.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.support import chains, figures, pulls, transfers
from bench.support.effort import Effort
from bench.support.figures import Row
from bench.support.scratch import Scratch, scratch

RESULTS = Path(__file__).resolve().parent.parent / "build/bench/storage.json"
FULL, QUICK = Effort(rounds=5), Effort(rounds=2)


def _chains(place: Scratch, effort: Effort) -> list[Row]:
    return asyncio.run(chains.measure(place, effort))


MEASURES = {"pulls": pulls.measure, "transfers": transfers.measure, "chains": _chains}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher figures")
    parser.add_argument("--only", action="append", choices=MEASURES, metavar="NAME", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("must run as root: file systems are mounted, and caches emptied")
    rows: list[Row] = []
    begun = time.monotonic()
    try:
        with interruptible(), scratch() as place:
            for name in options.only or MEASURES:
                print(f"-- {name} …", file=sys.stderr, flush=True)
                rows += MEASURES[name](place, QUICK if options.quick else FULL)
    except KeyboardInterrupt:
        print("interrupted; everything is undone", file=sys.stderr)
        return 130
    print(figures.table(rows))
    figures.write(options.json, rows, {}, [], quick=options.quick)
    print(f"\n{time.monotonic() - begun:.0f} s; all of it: {options.json}")
    return 0


@contextmanager
def interruptible() -> Iterator[None]:
    """The first signal ends what is measured, and no further one keeps it from being undone."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, interrupted)
    yield


if __name__ == "__main__":
    sys.exit(main())
