"""The workers that extract layers, run by the service: a few processes, started when needed, ended when idle.

pool = Pool()
done = await pool.apply(job, on_offset)
await pool.close()

A layer that is still being downloaded may come slowly, and mustn't keep those that are here from being extracted. So a
job that has been waiting for bytes leaves its slot to another and goes on beside that one. There are only so many that
may do so: one too many is Starved, and its caller comes again when the blob is whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import structlog
from shoal_bus.errors import Internal, from_wire

from shoal_snapshot.apply.errors import NeedsParent, StartedOver, Starved
from shoal_snapshot.apply.worker import Done, Job

log = structlog.get_logger(__name__)

IDLE_SECONDS = 10.0
_MOST_WORKERS = 3
"""Each takes some 12 MiB, and up to 8 for its decompressor: a pull is to stay below 150, with the services."""
_LONGEST_LINE = 1 << 25  # with the directories that a layer implies
_ATTEMPTS = 3
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
        self._idle: list[tuple[Process, asyncio.TimerHandle]] = []
        self._ending: set[asyncio.Task[None]] = set()

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

        try:
            starting = asyncio.ensure_future(self._worker())
            try:
                worker = await asyncio.shield(starting)
                answer = await self._ask(worker, job, on_offset, step_aside)
            except BaseException:
                await asyncio.shield(_kill(starting))
                raise
            self._keep(worker)
        finally:
            release()
        if "error" in answer:
            error = answer["error"]
            raise from_wire(error["code"], error["message"], error["hint"])
        if "again" in answer:
            raise _AGAIN[answer["again"]]
        done = answer["done"]
        return Done(**(done | {"identity": tuple(done["identity"])}))

    def _step_back(self) -> None:
        self._aside += 1

    async def close(self) -> None:
        """Ends every idle worker."""
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            await _end(worker)
        if self._ending:
            await asyncio.wait(self._ending)

    async def _worker(self) -> Process:
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            if worker.returncode is None:
                return worker
        for _ in range(_ATTEMPTS):
            worker = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "shoal_snapshot.apply.worker", str(os.getpid()),
                stdin=PIPE, stdout=PIPE, limit=_LONGEST_LINE,
            )  # fmt: skip
            assert worker.stdout is not None
            # A signal for the service's whole group ends a worker that isn't ready yet: that says nothing of the job.
            if await worker.stdout.readline():
                return worker
            log.warning("worker.not_started", status=await worker.wait())
        raise Internal("the process that extracts layers doesn't start", hint="see the service's log")

    async def _ask(
        self, worker: Process, job: Job, on_offset: Callable[[int], None], step_aside: Callable[[], None]
    ) -> dict[str, Any]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with suppress(ConnectionError):  # a dead worker: its output ends, and that is told below
            worker.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            await worker.stdin.drain()
        while line := await worker.stdout.readline():
            message: dict[str, Any] = json.loads(line)
            if "offset" in message:
                on_offset(message["offset"])
            elif "starved" in message:
                step_aside()
            else:
                return message
        status = await worker.wait()
        log.error("worker.died", status=status, digest=job.digest)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise Internal(f"layer {job.digest}: the process that extracted it {how}", hint="see the service's log")

    def _keep(self, worker: Process) -> None:
        timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._idled, worker)
        self._idle.append((worker, timer))

    def _idled(self, worker: Process) -> None:
        self._idle = [(other, timer) for other, timer in self._idle if other is not worker]
        task = asyncio.create_task(_end(worker))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _end(worker: Process) -> None:
    """Ends a worker that has nothing to do."""
    if worker.stdin is not None:
        worker.stdin.close()
    await worker.wait()


async def _kill(starting: asyncio.Future[Process]) -> None:
    """Kills a worker, also one that is just being started, and returns when it is dead."""
    await asyncio.wait({starting})
    if starting.exception() is not None:
        return
    worker = starting.result()
    with suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
