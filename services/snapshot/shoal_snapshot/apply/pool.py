"""The workers that extract layers, run by the service: a few processes, started when needed, ended when idle.

pool = Pool()
done = await pool.apply(job, on_offset)
await pool.close()
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

from shoal_snapshot.apply.worker import Done, Job

log = structlog.get_logger(__name__)

IDLE_SECONDS = 10.0
_LONGEST_LINE = 1 << 20
_ATTEMPTS = 3


def workers_wanted() -> int:
    """How many layers are extracted at once: one for each processor, between 2 and 4."""
    return min(4, max(2, len(os.sched_getaffinity(0))))


class Pool:
    """At most `size` workers. A job that is cancelled takes its worker with it."""

    def __init__(self, size: int = 0) -> None:
        self._slots = asyncio.Semaphore(size or workers_wanted())
        self._idle: list[tuple[Process, asyncio.TimerHandle]] = []
        self._ending: set[asyncio.Task[None]] = set()

    async def apply(self, job: Job, on_offset: Callable[[int], None]) -> Done:
        """Carries a job out in a worker; when this returns or raises, no process writes to the job's directory."""
        async with self._slots:
            starting = asyncio.ensure_future(self._worker())
            try:
                worker = await asyncio.shield(starting)
                answer = await self._ask(worker, job, on_offset)
            except BaseException:
                await asyncio.shield(_kill(starting))
                raise
            self._keep(worker)
        if "error" in answer:
            error = answer["error"]
            raise from_wire(error["code"], error["message"], error["hint"])
        return Done(**answer["done"])

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

    async def _ask(self, worker: Process, job: Job, on_offset: Callable[[int], None]) -> dict[str, Any]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with suppress(ConnectionError):  # a dead worker: its output ends, and that is told below
            worker.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            await worker.stdin.drain()
        while line := await worker.stdout.readline():
            message: dict[str, Any] = json.loads(line)
            if "offset" not in message:
                return message
            on_offset(message["offset"])
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
