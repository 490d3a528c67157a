"""One `shoal up` for a state directory: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal_bus.errors import FailedPrecondition


@contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Holds `<state>/up.lock` for a block. FAILED_PRECONDITION, naming the holder, when another process has it."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(state / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "?"
            raise FailedPrecondition(
                f"a node is up on {state} already (process {holder})",
                hint="stop it, or give another --state and --root",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
