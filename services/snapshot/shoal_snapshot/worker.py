"""Has work that takes long done in a process of its own (`shoal_snapshot.work`).

    answer = await run("copy", {"source": …, "target": …})

The process is killed with this one, and when whoever waits for it is cancelled. Bytes that the work makes (a layer)
go through a pipe, whose end `output` reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from shoal_bus.errors import Internal, from_wire
from shoal_bus.together import gather

_LONGEST_LINE = 1 << 20


async def run(
    what: str,
    arguments: dict[str, Any],
    *,
    on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
    output: Callable[[asyncio.StreamReader], Awaitable[None]] | None = None,
) -> dict[str, Any]:
    """Has the work `what` done, and returns its answer. When this returns or raises, no process works on it any more.

    Raises what the work said is wrong; INTERNAL if its process dies.
    """
    reading = writing = -1
    if output is not None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "shoal_snapshot.work", str(os.getpid()), str(writing),
            stdin=PIPE, stdout=PIPE, limit=_LONGEST_LINE, pass_fds=[writing] if writing >= 0 else [],
        )  # fmt: skip
    except BaseException:
        if reading >= 0:
            os.close(reading)
        raise
    finally:
        if writing >= 0:
            os.close(writing)
    try:
        works: list[Coroutine[Any, Any, Any]] = [_answer(process, {"what": what, "arguments": arguments}, on_progress)]
        if output is not None:
            works.append(_read(reading, output))
        answer: dict[str, Any] = (await gather(*works))[0]
        return answer
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())


async def _read(fd: int, output: Callable[[asyncio.StreamReader], Awaitable[None]]) -> None:
    reader = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0))
    try:
        await output(reader)
    finally:
        transport.close()


async def _answer(
    process: Process, work: dict[str, Any], on_progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(ConnectionError):  # it died: its output ends, and that is told below
        process.stdin.write(json.dumps(work).encode())
        await process.stdin.drain()
        process.stdin.close()
    while line := await process.stdout.readline():
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            error = message["error"]
            raise from_wire(error["code"], error["message"], error["hint"])
        if "done" in message:
            done: dict[str, Any] = message["done"]
            return done
        on_progress(message["progress"])
    status = await process.wait()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    raise Internal(f"{work['what']}: the process that did it {how}", hint="see the service's log")
