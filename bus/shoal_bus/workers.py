"""Processes of a service's own for what would keep its event loop: started when needed, ended when idle.

    workers = Workers("shoal_snapshot.apply.worker", "extracts layers")
    answer = await workers.ask(job, "layer sha256:…", heard)
    await workers.close()

A worker (`python -P -m <module> <parent's pid>`) says one line when it is ready. Then it reads jobs from standard
input, one at a time and each on a line of JSON, and answers on standard output: any number of messages, the last of
which has `done`, `error` (code, message, hint) or `again`. It ends with its input, and dies with its parent.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import structlog

from shoal_bus.errors import Internal, from_wire

log = structlog.get_logger(__name__)

IDLE_SECONDS = 10.0
_ATTEMPTS = 3
_ANSWERS = ("done", "error", "again")


class Workers:
    """Those of one module; `does` is what one does, in an error's words. Whoever asks bounds how many there are."""

    def __init__(self, module: str, does: str, *, longest_line: int = 1 << 16) -> None:
        self._module, self._does, self._longest_line = module, does, longest_line
        self._idle: list[tuple[Process, asyncio.TimerHandle]] = []
        self._ending: set[asyncio.Task[None]] = set()

    async def ask(self, job: Mapping[str, Any], what: str, heard: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Has a worker do a job, on `what`; its answer, which has `done` or `again`. `heard` gets what comes before.

        Raises what the worker says is wrong, and what `heard` raises; INTERNAL where the worker dies. One whose job is
        cancelled is killed: when this returns or raises, no process works on the job any more.
        """
        starting = asyncio.ensure_future(self._worker())
        try:
            worker = await asyncio.shield(starting)
            answer = await self._answer(worker, job, what, heard)
        except BaseException:
            await asyncio.shield(_kill(starting))
            raise
        self._keep(worker)
        if "error" in answer:
            error = answer["error"]
            raise from_wire(error["code"], error["message"], error["hint"])
        return answer

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
                sys.executable, "-P", "-m", self._module, str(os.getpid()),
                stdin=PIPE, stdout=PIPE, limit=self._longest_line,
            )  # fmt: skip
            assert worker.stdout is not None
            # A signal for the service's whole group ends a worker that isn't ready yet: that says nothing of the job.
            if await worker.stdout.readline():
                return worker
            log.warning("worker.not_started", status=await worker.wait())
        raise Internal(f"the process that {self._does} doesn't start", hint="see the service's log")

    async def _answer(
        self, worker: Process, job: Mapping[str, Any], what: str, heard: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with suppress(ConnectionError):  # a dead worker: its output ends, and that is told below
            worker.stdin.write(json.dumps(job).encode() + b"\n")
            await worker.stdin.drain()
        while line := await worker.stdout.readline():
            message: dict[str, Any] = json.loads(line)
            if any(key in message for key in _ANSWERS):
                return message
            heard(message)
        status = await worker.wait()
        log.error("worker.died", status=status, job=what)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise Internal(f"{what}: the process that {self._does} {how}", hint="see the service's log")

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
