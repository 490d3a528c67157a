"""containerd's API: shoal's gateway beside Debian's containerd, by the same clients, in one run and in turn.

    make bench                                       with the others, some minutes
    .venv/bin/python bench/gateway.py --quick        everything, two minutes
    .venv/bin/python bench/gateway.py --only lives --profile

As root. docs/benchmarks.md says what each figure is.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.support import ctr, lives, memory, requests, session, sockets

MEASURES = {
    "memory": memory.measure,  # first: what a service has used, it keeps
    "requests": requests.measure,
    "ctr": ctr.measure,
    "lives": lives.measure,
}

if __name__ == "__main__":
    sys.exit(session.main(__doc__, "gateway", sockets.opened, MEASURES))
