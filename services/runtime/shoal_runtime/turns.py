"""How many containers are made at once: hundreds of OCI runtimes beside each other make none any sooner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_STUCK_SECONDS = 5.0


class Turns:
    """`count` at a time have their turn. When none of them comes to an end, the next ones go all the same.

    One may be waiting for another (in a hook, say), and none may keep the rest of the node from working.
    """

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._ended_at = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a turn, and has it for a block."""
        began = time.monotonic()
        held = False
        while not held and time.monotonic() - max(began, self._ended_at) < _STUCK_SECONDS:
            try:
                async with asyncio.timeout(_STUCK_SECONDS):
                    held = await self._free.acquire()
            except TimeoutError:
                continue
        try:
            yield
        finally:
            self._ended_at = time.monotonic()
            if held:
                self._free.release()
