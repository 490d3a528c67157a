"""When the files of removed snapshots are deleted: in a thread, together, and not while more are being removed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from shoal_snapshot.snapshotter import Snapshotter

_TOGETHER_SECONDS = 0.05
"""How long deleting waits for more to delete: it would hold up whoever removes one snapshot after another."""


class Deleting:
    """What one snapshotter has to delete."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter
        self._task: asyncio.Task[None] | None = None
        self._more, self._awaited = False, asyncio.Event()
        self.behind = 0
        """How many snapshots have been discarded since it last began."""

    def discard(self, id: int) -> None:
        """Takes a snapshot's directories away at once, to be deleted soon."""
        self.behind += 1
        self._snapshotter.discard(id)
        self.soon()

    def soon(self) -> None:
        """Has everything deleted that has been taken away, and what comes meanwhile."""
        self._more = True
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def done(self, seconds: float | None = None) -> None:
        """Returns when all has been deleted, or after `seconds`."""
        if self._task is not None:
            self._awaited.set()
            await asyncio.wait({self._task}, timeout=seconds)

    async def _run(self) -> None:
        try:
            while self._more:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._awaited.wait(), _TOGETHER_SECONDS)
                self._more, self.behind = False, 0
                await asyncio.to_thread(self._snapshotter.empty_trash)
        finally:
            self._task = None
            self._awaited.clear()
