"""The processes that extract layers (`shoal_snapshot.apply.worker`), of which there are a few.

pool = Pool()
done = await pool.apply(job, on_offset)
await pool.close()

A layer that is still being downloaded may come slowly, and mustn't keep those that are here from being extracted. So a
job that has been waiting for bytes leaves its slot to another and goes on beside that one. There are only so many that
may do so: one too many is Starved, and its caller comes again when the blob is whole.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from shoal_bus.workers import Workers

from shoal_snapshot.apply.errors import NeedsParent, StartedOver, Starved
from shoal_snapshot.apply.worker import Done, Job

_MOST_WORKERS = 3
"""Each takes some 12 MiB, and up to 8 for its decompressor: a pull is to stay below 150, with the services."""
_LONGEST_LINE = 1 << 25  # with the directories that a layer implies
_AGAIN: dict[str, type[Exception]] = {one.__name__: one for one in (NeedsParent, StartedOver, Starved)}


def workers_wanted() -> int:
    """How many layers are extracted at once: one for each processor, 2 or 3."""
    return min(_MOST_WORKERS, max(2, len(os.sched_getaffinity(0))))


class Pool:
    """At most `size` workers, and `aside` more that wait for their blobs. A job that is cancelled takes its worker
    with it."""

    def __init__(self, size: int = 0, aside: int = -1) -> None:
        size = size or workers_wanted()
        self._slots = asyncio.Semaphore(size)
        self._aside = aside if aside >= 0 else _MOST_WORKERS - size
        self._workers = Workers("shoal_snapshot.apply.worker", "extracts layers", longest_line=_LONGEST_LINE)
        self.close = self._workers.close

    async def apply(self, job: Job, on_offset: Callable[[int], None]) -> Done:
        """Carries a job out in a worker; when this returns or raises, no process writes to the job's directory.

        It raises what the worker says is wrong; NeedsParent and StartedOver as the worker does; Starved.
        """
        await self._slots.acquire()
        release = self._slots.release

        def step_aside() -> None:
            nonlocal release
            if not self._aside:
                raise Starved
            self._aside -= 1
            self._slots.release()
            release = self._step_back

        def heard(message: dict[str, Any]) -> None:
            if "starved" in message:
                step_aside()
            else:
                on_offset(message["offset"])

        try:
            answer = await self._workers.ask(asdict(job), f"layer {job.digest}", heard)
        finally:
            release()
        if "again" in answer:
            raise _AGAIN[answer["again"]]
        done = answer["done"]
        return Done(**(done | {"identity": tuple(done["identity"])}))

    def _step_back(self) -> None:
        self._aside += 1
