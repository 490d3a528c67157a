"""Execution, beside Debian's containerd: the same runtime, image and specification, in one run and in turn.

    make bench                                         everything, some minutes
    .venv/bin/python bench/execution.py --quick        everything, a minute
    .venv/bin/python bench/execution.py --only lifecycle --profile

As root. docs/benchmarks.md says what each figure is.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.support import command_line, crun, latency, lifecycle, memory, session, world

MEASURES = {
    "memory": memory.measure,  # first: what a service has used, it keeps
    "lifecycle": lifecycle.measure,
    "latency": latency.measure,
    "commands": command_line.measure,
    "crun": crun.measure,
}

if __name__ == "__main__":
    sys.exit(session.main(__doc__, "execution", world.opened, MEASURES))
