"""The work on archives and layers, done by processes (`shoal_content.archives.work.worker`).

pool = Pool()
await pool.load(Load(archive, directory), on_progress)
await pool.close()
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from shoal_bus.workers import Workers

from shoal_content.archives.work.load import Load
from shoal_content.archives.work.recompress import Recompress
from shoal_content.archives.work.save import Save

Report = Callable[[int, int], None]

_STREAMS = 16
"""Archives that come or go at once: each may wait for whoever is at its other end."""


class Pool:
    """A job that is cancelled takes its worker with it: when that is told, nothing is written any more."""

    def __init__(self) -> None:
        self._workers = Workers("shoal_content.archives.work.worker", "works on archives")
        self._streams = asyncio.Semaphore(_STREAMS)
        self._compressing = asyncio.Semaphore(min(4, max(2, len(os.sched_getaffinity(0)))))
        self.close = self._workers.close

    async def load(self, job: Load, report: Report) -> None:
        """Takes an archive apart."""
        async with self._streams:
            await self._do("load", "the archive", job, report)

    async def save(self, job: Save, report: Report) -> None:
        """Writes an archive."""
        async with self._streams:
            await self._do("save", "the archive", job, report)

    async def recompress(self, job: Recompress, report: Report) -> tuple[str, int]:
        """Compresses a layer anew; the digest and the size of what was made."""
        async with self._compressing:
            done = await self._do("recompress", f"layer {job.digest}", job, report)
        return done["digest"], done["size"]

    async def _do(self, kind: str, what: str, job: Load | Save | Recompress, report: Report) -> dict[str, Any]:
        answer = await self._workers.ask(
            {"kind": kind, "what": what, "job": asdict(job)}, what, lambda told: report(told["offset"], told["total"])
        )
        done: dict[str, Any] = answer["done"]
        return done
