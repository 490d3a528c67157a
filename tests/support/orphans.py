"""A test in the place of pid 1: whatever its processes leave without a parent comes to it, and is seen and reaped.

Without that, what outlives its parent becomes a child of the machine's pid 1, and nobody can say whose it was.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.support import process_table
from tests.support.process_table import Entry

PR_SET_CHILD_SUBREAPER = 36
_ZOMBIE_SECONDS = 5.0
"""How long a parent may take to reap a child, on a machine that is busy."""


class Orphans:
    """The processes below this one, but those from before. `own` are pids that it starts and waits for itself."""

    def __init__(self, own: Callable[[], set[int]]) -> None:
        before = {entry.pid for entry in process_table.below(os.getpid())}
        self._own = lambda: before | own()
        self._zombies: dict[Entry, float] = {}

    def reap(self) -> None:
        """Reaps what has ended and has come to us, as init does."""
        for entry in process_table.below(os.getpid()):
            if entry.parent == os.getpid() and entry.is_zombie and entry.pid not in self._own():
                with suppress(ChildProcessError):  # one of our own, which has just been waited for
                    os.waitpid(entry.pid, os.WNOHANG)

    def living(self) -> list[Entry]:
        """Everything below this process that we didn't start ourselves; zombies count."""
        self.reap()
        return [entry for entry in process_table.below(os.getpid()) if entry.pid not in self._own()]

    def unreaped(self) -> list[Entry]:
        """The zombies that their own parents have left lying for long. Call it every now and then."""
        self.reap()
        now = time.monotonic()
        entries = process_table.below(os.getpid())
        seen = {entry for entry in entries if entry.is_zombie and entry.parent != os.getpid()}
        self._zombies = {entry: self._zombies.get(entry, now) for entry in seen}
        return [entry for entry, since in self._zombies.items() if now - since > _ZOMBIE_SECONDS]


@contextmanager
def in_place_of_init(own: Callable[[], set[int]]) -> Iterator[Orphans]:
    """Adopts every orphan below this process while the block lasts (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield Orphans(own)
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
