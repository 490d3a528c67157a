"""What long work on images has in common: it holds what it needs, makes it somewhere, leaves nothing if it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal_bus.api.content import Image
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import NotFound
from shoal_bus.types import Descriptor, Labels

from shoal_content.archives.staging import Stagings
from shoal_content.archives.work.pool import Pool
from shoal_content.blobs.store import Store
from shoal_content.collection.collect import Collector, want
from shoal_content.images.records import Images
from shoal_content.images.tree import Trees
from shoal_content.leasing import attach, require
from shoal_content.transfer.holds import Holds
from shoal_content.transfer.unpack import Unpacker


@dataclass(frozen=True)
class Tools:
    """The parts of this service that such work is done with."""

    database: Database
    store: Store
    trees: Trees
    images: Images
    holds: Holds
    collector: Collector
    stagings: Stagings
    unpacker: Unpacker
    pool: Pool
    archives: Path
    """The directory that archives come from and go to."""

    @asynccontextmanager
    async def begun(self, ctx: Context) -> AsyncIterator[str]:
        """An operation under way, with what makes its steps' ids unique; one that raises is undone.

        NOT_FOUND for its lease, before anything is done.

        What it holds isn't given back at the end of the block: that belongs into the transaction that it ends with.
        """
        nonce = self.holds.begin(ctx.id, ctx.namespace)
        try:
            with self.database.write() as tx:
                require(tx, ctx.namespace, ctx.lease)
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

    def put_image(self, tx: Transaction, ctx: Context, name: str, target: Descriptor, labels: Labels) -> Image:
        """The record of an image that an operation has made, to which its snapshots belong from here on."""
        old = self.images.find(ctx.namespace, name)
        kept = old.labels if old is not None else {}
        image = self.images.put(tx, ctx.namespace, name, target, kept | labels, ctx.id)
        self.holds.hand_over(tx, ctx.id, ctx.namespace, name, ctx.lease)
        attach(tx, ctx.namespace, ctx.lease, "images", name)
        if old is not None and old.target.digest != target.digest:
            want(tx)
        return image

    def add_unpacked(self, tx: Transaction, ctx: Context, name: str, chain: Collection[str]) -> None:
        """The snapshots of `chain` belong to an image that was there before."""
        self.holds.hand_over(tx, ctx.id, ctx.namespace, name, ctx.lease)

    def end(self, tx: Transaction, ctx: Context) -> None:
        """Gives back what an operation held that has come to its good end."""
        self.holds.end(tx, ctx.id)

    async def collect(self, ctx: Context) -> None:
        """Has what became superfluous taken away."""
        await self.collector.after_deletion(wait=True, asked=False)

    async def undo(self, ctx: Context) -> None:
        """Takes away what an operation has made that came to nothing: files first, a full disk may be the reason."""
        await self.stagings.drop(ctx.id)
        self.holds.fail(ctx.id)
        await self.collect(ctx)
