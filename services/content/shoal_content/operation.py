"""What long work on images has in common: it holds what it needs, makes it somewhere, leaves nothing if it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import NotFound
from shoal_bus.locks import Locks

from shoal_content.collect import Collector
from shoal_content.holds import Holds
from shoal_content.images import Images
from shoal_content.staging import Stagings
from shoal_content.store import Store
from shoal_content.unpack import Unpacker
from shoal_content.work.pool import Pool


@dataclass(frozen=True)
class Tools:
    """The parts of this service that such work is done with."""

    database: Database
    store: Store
    images: Images
    holds: Holds
    collector: Collector
    locks: Locks
    stagings: Stagings
    unpacker: Unpacker
    pool: Pool
    archives: Path
    """The directory that archives come from and go to."""

    @asynccontextmanager
    async def begun(self, ctx: Context) -> AsyncIterator[str]:
        """An operation under way, with what makes its steps' ids unique; one that raises is undone.

        What it holds isn't given back at the end of the block: that belongs into the transaction that it ends with.
        """
        nonce = self.holds.begin(ctx.id, ctx.namespace)
        try:
            yield nonce
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and ctx.draining.is_set():
                raise  # the next copy goes on
            try:
                await self.undo(ctx)
            except Exception:
                # What it failed with is its caller's; the sweep undoes what is left (`Holds.dead`).
                ctx.log.exception("operation.undo_failed")
            raise
        await self.stagings.drop(ctx.id)

    def hold(self, ctx: Context, digests: Collection[str]) -> None:
        """Holds blobs that are here. NOT_FOUND when one has just been removed."""
        for digest in digests:
            self.holds.hold_blob(ctx.id, ctx.namespace, digest)
        for digest in digests:
            if not self.store.sees(ctx.namespace, digest):
                raise NotFound(f"blob {digest}: was removed meanwhile", hint="pull its image again")

    async def undo(self, ctx: Context) -> None:
        """Takes away what an operation has made that came to nothing: files first, a full disk may be the reason."""
        await self.stagings.drop(ctx.id)
        self.holds.fail(ctx.id)
        await self.collector.finish(ctx.client)
