"""What a gateway puts into the node's state directory for another service, which is told its name and never a path.

Only root can read there or put anything, and nothing of it touches the bus.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def place(directory: Path) -> Iterator[Path]:
    """A path in `directory` that nobody else has; what is made there is removed at the end of the block."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(directory)
    path = directory / f"{os.getpid()}-{secrets.token_hex(8)}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _sweep(directory: Path) -> None:
    """Removes what gateways have left that were killed."""
    for path in directory.iterdir():
        pid, dash, _ = path.name.partition("-")
        if dash and pid.isdecimal() and not Path("/proc", pid).exists():
            with suppress(OSError):
                path.unlink()
