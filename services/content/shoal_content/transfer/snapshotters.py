"""Whether there is a snapshotter of a name, before anything is fetched for it."""

from __future__ import annotations

from shoal_bus.api import snapshot as snapshots
from shoal_bus.client import Client, Unreached
from shoal_bus.context import Context
from shoal_bus.errors import InvalidArgument, NotFound

_PATIENCE_SECONDS = 30.0
_ELSEWHERE_SECONDS = 0.3
"""How long one is waited for that another process than the snapshot service would answer for."""


class Snapshotters:
    """Those that have answered once aren't asked for again: one that is away for a while is waited for by its user."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    async def require(self, ctx: Context, *names: str) -> None:
        """NOT_FOUND for a snapshotter that nobody answers for. An empty name is none.

        An operation that another copy has begun asked then.
        """
        for name in dict.fromkeys(names):
            if name and name not in self._known and not ctx.resumed:
                await self._find(ctx.client, name)

    async def _find(self, client: Client, name: str) -> None:
        listed = client.stream(snapshots.SNAPSHOTTER_LIST, snapshots.SnapshotterRequest(), patience=_PATIENCE_SECONDS)
        self._known |= {one.name async for one in listed}
        if name in self._known:
            return
        info = snapshots.SNAPSHOT_INFO.on(name)
        try:
            await client.call(info, snapshots.SnapshotterRequest(), patience=_ELSEWHERE_SECONDS)
        except ValueError:
            raise InvalidArgument(f"snapshotter {name[:100]!r}: can't be the name of one") from None
        except Unreached:
            there = ", ".join(sorted(self._known))
            raise NotFound(f"snapshotter {name}: there is none on this node", hint=f"it has {there}") from None
        self._known.add(name)
