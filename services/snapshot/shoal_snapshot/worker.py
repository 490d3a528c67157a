"""Has trees copied and layers computed by processes of this service's own (`shoal_snapshot.work`).

works = Works()
await works.copy(source, target)
made = await works.compute({"lower": …, "upper": …, "compression": "gzip"}, on_progress, output)
await works.close()
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from shoal_bus.together import gather
from shoal_bus.workers import Workers

_LONGEST_LINE = 1 << 20

Heard = Callable[[dict[str, Any]], None]


class Works:
    """Workers from the first piece of work on: many nodes never have any.

    A job that is cancelled takes its worker with it: when a call returns or raises, no process works on it any more.
    Each raises what the worker says is wrong; INTERNAL if that dies.
    """

    def __init__(self) -> None:
        self._workers: Workers | None = None

    async def copy(self, source: str, target: str) -> None:
        """Copies what one directory holds into another one."""
        await self._ask("copy", {"source": source, "target": target}, lambda _: None)

    async def compute(
        self,
        arguments: dict[str, Any],
        on_progress: Callable[[dict[str, int]], None],
        output: Callable[[asyncio.StreamReader], Awaitable[None]],
    ) -> dict[str, Any]:
        """Computes a layer (`diff.compute`), whose bytes `output` reads; what it is."""
        read, write = os.pipe2(os.O_CLOEXEC)
        with os.fdopen(read, "rb", 0) as reading, os.fdopen(write, "wb", 0) as writing:

            def heard(message: dict[str, Any]) -> None:
                if "opened" in message:
                    writing.close()  # the worker's end is the last one
                else:
                    on_progress(message["progress"])

            job = arguments | {"output": f"/proc/{os.getpid()}/fd/{write}"}
            made: dict[str, Any] = (await gather(self._ask("compute", job, heard), _read(reading, output)))[0]
        return made

    async def close(self) -> None:
        """Ends the workers."""
        if self._workers is not None:
            await self._workers.close()

    async def _ask(self, what: str, arguments: dict[str, Any], heard: Heard) -> dict[str, Any]:
        if self._workers is None:
            self._workers = Workers("shoal_snapshot.work", "did it", longest_line=_LONGEST_LINE)
        answer = await self._workers.ask({"what": what, "arguments": arguments}, what, heard)
        done: dict[str, Any] = answer["done"]
        return done


async def _read(pipe: Any, output: Callable[[asyncio.StreamReader], Awaitable[None]]) -> None:
    reader = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        await output(reader)
    finally:
        transport.close()
