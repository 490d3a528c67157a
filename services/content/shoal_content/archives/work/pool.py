"""The workers, run by the service: each is started when needed, and ended when it has been idle for a while.

pool = Pool()
done = await pool.load(Load(archive, directory), on_progress)
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

from shoal_content.archives.work.load import Load
from shoal_content.archives.work.recompress import Recompress
from shoal_content.archives.work.save import Save

log = structlog.get_logger(__name__)

Report = Callable[[int, int], None]
IDLE_SECONDS = 10.0
_WORKER = "shoal_content.archives.work.worker"
_ATTEMPTS = 3
_STREAMS = 16
"""Archives that come or go at once: each may wait for whoever is at its other end."""


class Pool:
    """A job that is cancelled takes its worker with it: when that is told, nothing is written any more."""

    def __init__(self) -> None:
        self._streams = asyncio.Semaphore(_STREAMS)
        self._compressing = asyncio.Semaphore(min(4, max(2, len(os.sched_getaffinity(0)))))
        self._idle: list[tuple[Process, asyncio.TimerHandle]] = []
        self._ending: set[asyncio.Task[None]] = set()

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

    async def close(self) -> None:
        """Ends every idle worker."""
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            await _end(worker)
        if self._ending:
            await asyncio.wait(self._ending)

    async def _do(self, kind: str, what: str, job: Load | Save | Recompress, report: Report) -> dict[str, Any]:
        starting = asyncio.ensure_future(self._worker())
        try:
            worker = await asyncio.shield(starting)
            answer = await self._ask(worker, {"kind": kind, "what": what, "job": asdict(job)}, report)
        except BaseException:
            await asyncio.shield(_kill(starting))
            raise
        self._keep(worker)
        if "error" in answer:
            error = answer["error"]
            raise from_wire(error["code"], error["message"], error["hint"])
        done: dict[str, Any] = answer["done"]
        return done

    async def _worker(self) -> Process:
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            if worker.returncode is None:
                return worker
        for _ in range(_ATTEMPTS):
            worker = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "shoal_content.archives.work.worker",
                str(os.getpid()),
                stdin=PIPE,
                stdout=PIPE,
            )
            assert worker.stdout is not None
            # A signal for the service's whole group ends a worker that isn't ready yet: that says nothing of the job.
            if await worker.stdout.readline():
                return worker
            log.warning("worker.not_started", status=await worker.wait())
        raise Internal("the process that works on archives doesn't start", hint="see the service's log")

    async def _ask(self, worker: Process, job: dict[str, Any], report: Report) -> dict[str, Any]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with suppress(ConnectionError):  # a dead worker: its output ends, and that is told below
            worker.stdin.write(json.dumps(job).encode() + b"\n")
            await worker.stdin.drain()
        while line := await worker.stdout.readline():
            message: dict[str, Any] = json.loads(line)
            if "offset" not in message:
                return message
            report(message["offset"], message["total"])
        status = await worker.wait()
        log.error("worker.died", status=status, job=job["kind"])
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise Internal(f"{job['what']}: the process that worked on it {how}", hint="see the service's log")

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
