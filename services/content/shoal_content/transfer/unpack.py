"""Images whose blobs are here, unpacked: each layer a snapshot, from the lowest up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal_bus.api import snapshot as snapshots
from shoal_bus.context import Context
from shoal_bus.errors import Cancelled, NotFound, ShoalError
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.blobs.following import Following
from shoal_content.blobs.store import Store
from shoal_content.transfer.holds import Holds
from shoal_content.transfer.snapshotters import Snapshotters

_TRIES = 5


class Unpacker:
    """Has the snapshot service unpack what an operation holds; the snapshots are held by it as well."""

    def __init__(self, store: Store, following: Following, holds: Holds, snapshotters: Snapshotters) -> None:
        self._store, self._following, self._holds = store, following, holds
        self.require = snapshotters.require

    async def unpack(
        self,
        ctx: Context,
        nonce: str,
        name: str,
        snapshotter: str,
        layers: Sequence[Descriptor],
        diff_ids: Sequence[str],
        report: Callable[[int], None],
    ) -> list[str]:
        """Makes each layer a snapshot, unless there is one, and tells how many are done; the chain IDs, bottom first.

        `nonce` is what `Holds.begin` gave the operation: a resumed one repeats the same steps.
        """
        chain = media.chain_ids(diff_ids)
        parent = ""
        for at, chain_id in enumerate(chain):
            if not await self._hold(ctx, snapshotter, chain_id):
                path = self._following.path(nonce, at)
                self._following.point(path, self._store.path(layers[at].digest))
                request = snapshots.UnpackLayer(
                    name=chain_id,
                    parent=parent,
                    descriptor=layers[at],
                    path=str(path),
                    diff_id=diff_ids[at],
                )
                try:
                    await self._have_unpacked(ctx, f"{nonce}.{snapshotter}.{chain_id[-16:]}", snapshotter, request)
                except Cancelled:
                    raise
                except ShoalError as error:
                    raise type(error)(
                        f"image {name}: layer {layers[at].digest}: {error.message}", hint=error.hint
                    ) from None
            parent = chain_id
            report(at + 1)
        self._following.forget(nonce)
        return chain

    async def _have_unpacked(self, ctx: Context, step: str, snapshotter: str, request: snapshots.UnpackLayer) -> None:
        for attempt in range(_TRIES):
            try:
                await ctx.operate(snapshots.SNAPSHOT_UNPACK.on(snapshotter), request, step=f"{step}.{attempt}")
                return
            except Cancelled:
                # A copy of ours that was stopped, or away for too long, had it cancelled: this is another try.
                if attempt == _TRIES - 1:
                    raise

    async def _hold(self, ctx: Context, snapshotter: str, chain_id: str) -> bool:
        """Holds a layer's snapshot; says whether it is there already."""
        # In this order: a collection that hasn't seen that it is held sees that it has been looked at.
        self._holds.hold_snapshots(ctx.id, ctx.namespace, snapshotter, chain_id)
        try:
            stat = snapshots.SNAPSHOT_STAT.on(snapshotter)
            await ctx.client.call(stat, snapshots.SnapshotRequest(key=chain_id), patience=30.0)
        except NotFound:
            return False
        return True
