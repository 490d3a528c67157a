"""Snapshots made under a lease: the lease has them before they are there."""

from __future__ import annotations

from shoal_bus.api.content import LEASE_ADD, ChangeLease
from shoal_bus.context import Context
from shoal_bus.database import Transaction


async def add_to_lease(ctx: Context, snapshotter: str, key: str) -> None:
    """Adds a snapshot that is about to be made to the request's lease, if it has one. NOT_FOUND for the lease."""
    if ctx.lease:
        request = ChangeLease(lease=ctx.lease, type=f"snapshots/{snapshotter}", id=key)
        await ctx.call(LEASE_ADD, request, step="lease")


def mark_leased(tx: Transaction, ctx: Context, id: int) -> None:
    """Notes that a snapshot was made under a lease: that alone holds it, and not that it has just been made."""
    if ctx.lease:
        tx.execute("UPDATE snapshots SET leased = 1 WHERE id = ?", (id,))
