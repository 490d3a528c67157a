"""A snapshotter in a process of its own, which the snapshot service knows nothing of: all there is to one.

It answers `shoal.v1.<node>.*.snapshot.external.<verb>`.
"""

from __future__ import annotations

from shoal_bus.process import Process, run_service
from shoal_snapshot.apply.pool import Pool
from shoal_snapshot.layers import Layers
from shoal_snapshot.native import Native
from shoal_snapshot.records import MIGRATIONS
from shoal_snapshot.service import register
from shoal_snapshot.snapshots import Snapshots


class External(Native):
    name = "external"


async def setup(process: Process) -> None:
    snapshots = Snapshots(process.database(MIGRATIONS), External(process.root / "files"))
    pool = Pool()
    process.stack.push_async_callback(pool.close)
    process.stack.push_async_callback(snapshots.settled)
    process.stack.push_async_callback(snapshots.snapshotter.close)
    register(
        process.service("a snapshotter elsewhere"),
        snapshots,
        Layers(snapshots, pool, process.node.root_of("content"), process.state),
    )
    snapshots.reconcile()


if __name__ == "__main__":
    run_service("external", setup)
