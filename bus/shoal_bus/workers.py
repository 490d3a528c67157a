"""Processes of a service's own for what would keep its event loop: forked when needed, ended when idle.

    workers = Workers("shoal_snapshot.apply.worker", "extracts layers")
    answer = await workers.ask(job, "layer sha256:…", heard)
    await workers.close()

A worker (`shoal_bus.forkserver`) reads jobs, one at a time and each on a line of JSON, and answers each with any number
of messages, the last of which has `done`, `error` (code, message, hint) or `again`. It ends with its input, and dies
with its service.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import structlog

from shoal_bus.errors import Internal, from_wire
from shoal_bus.forkserver import ForkServer, Gone, Worker

log = structlog.get_logger(__name__)

IDLE_SECONDS = 10.0
_ATTEMPTS = 3
_ANSWERS = ("done", "error", "again")


class Workers:
    """Those of one module; `does` is what one does, in an error's words. Whoever asks bounds how many there are."""

    def __init__(self, module: str, does: str, *, longest_line: int = 1 << 16) -> None:
        self._does = does
        self._server = ForkServer(module, longest_line=longest_line)
        self._idle: list[tuple[Worker, asyncio.TimerHandle]] = []
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
        """Ends every idle worker, and what forks them."""
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            await _end(worker)
        if self._ending:
            await asyncio.wait(self._ending)
        await self._server.close()

    async def _worker(self) -> Worker:
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            if not worker.ended:
                return worker
        for _ in range(_ATTEMPTS):
            try:
                return await self._server.fork()
            except Gone as gone:
                log.warning("worker.not_started", error=str(gone))
        raise Internal(f"the process that {self._does} doesn't start", hint="see the service's log")

    async def _answer(
        self, worker: Worker, job: Mapping[str, Any], what: str, heard: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        with suppress(ConnectionError):  # a dead worker: its output ends, and that is told below
            worker.writer.write(json.dumps(job).encode() + b"\n")
            await worker.writer.drain()
        with suppress(ConnectionError):  # it died with some of its input unread
            while line := await worker.reader.readline():
                message: dict[str, Any] = json.loads(line)
                if any(key in message for key in _ANSWERS):
                    return message
                heard(message)
        status = await worker.wait()
        log.error("worker.died", status=status, job=what)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise Internal(f"{what}: the process that {self._does} {how}", hint="see the service's log")

    def _keep(self, worker: Worker) -> None:
        timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._idled, worker)
        self._idle.append((worker, timer))

    def _idled(self, worker: Worker) -> None:
        self._idle = [(other, timer) for other, timer in self._idle if other is not worker]
        task = asyncio.create_task(_end(worker))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _end(worker: Worker) -> None:
    """Ends a worker that has nothing to do."""
    worker.writer.close()
    await worker.wait()


async def _kill(starting: asyncio.Future[Worker]) -> None:
    """Kills a worker, also one that is just being started, and returns when it is dead."""
    await asyncio.wait({starting})
    if starting.cancelled() or starting.exception() is not None:
        return
    worker = starting.result()
    worker.kill()
    await worker.wait()
