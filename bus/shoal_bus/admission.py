"""How many handlers are at work at once: a bound that a handler doesn't use up while it waits for somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self


class Slot:
    """A handler's place among those at work.

        async with Slot(slots) as slot:
            …                       # at work
            async with slot.away():
                …                   # waiting for another service: somebody else may work

    Handlers that call one another, or their own service, therefore can't use up all places by waiting for each other.
    """

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._held = False
        self._away = 0

    async def __aenter__(self) -> Self:
        await self._slots.acquire()
        self._held = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._give()

    @asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Gives the place to others for a block. Blocks may overlap: it is taken back after the last of them."""
        self._away += 1
        self._give()
        try:
            yield
        finally:
            self._away -= 1
            if not self._away:
                await self._slots.acquire()
                if self._away or self._held:  # it left again, or another block's end was faster
                    self._slots.release()
                else:
                    self._held = True

    def _give(self) -> None:
        if self._held:
            self._held = False
            self._slots.release()
