"""Subjects to domain: which verb is answered by what, and what it locks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from shoal_bus.api import snapshot as api
from shoal_bus.process import Process

from shoal_snapshot.apply.pool import Pool
from shoal_snapshot.layers import Layers, target_of
from shoal_snapshot.overlayfs import Overlayfs
from shoal_snapshot.processors import DEFAULT_FILE, load
from shoal_snapshot.records import MIGRATIONS
from shoal_snapshot.snapshots import Snapshots


def arguments(parser: argparse.ArgumentParser) -> None:
    """The service's own flags."""
    parser.add_argument(
        "--stream-processors",
        type=Path,
        default=Path(os.environ.get("SHOAL_STREAM_PROCESSORS", "") or DEFAULT_FILE),
        help=f"programs that decompress layers (default: SHOAL_STREAM_PROCESSORS, or {DEFAULT_FILE})",
    )


async def setup(process: Process) -> None:
    """Registers every verb, and mends what the last copy left."""
    database = process.database(MIGRATIONS)
    service = process.service("snapshots, and layers applied to them")
    snapshotter = Overlayfs(process.root / Overlayfs.name)
    snapshots = Snapshots(database, snapshotter)
    pool = Pool()
    process.stack.push_async_callback(pool.close)
    process.stack.push_async_callback(snapshots.settled)
    layers = Layers(
        snapshots, pool, process.node.root_of("content"), process.state, load(process.args.stream_processors)
    )
    name = snapshotter.name

    service.handle(
        api.SNAPSHOT_PREPARE.on(name), snapshots.prepare, lock=lambda r: f"snapshot/{r.key}", begins_itself=True
    )
    service.handle(api.SNAPSHOT_VIEW.on(name), snapshots.view, lock=lambda r: f"snapshot/{r.key}", begins_itself=True)
    service.handle(api.SNAPSHOT_COMMIT.on(name), snapshots.commit, lock=lambda r: f"snapshot/{r.key}")
    service.handle(api.SNAPSHOT_MOUNTS.on(name), snapshots.mounts)
    service.handle(api.SNAPSHOT_STAT.on(name), snapshots.stat)
    service.handle(
        api.SNAPSHOT_UPDATE.on(name), snapshots.update, lock=lambda r: f"snapshot/{r.key}", begins_itself=True
    )
    service.stream(api.SNAPSHOT_LIST.on(name), snapshots.each)
    service.handle(api.SNAPSHOT_USAGE.on(name), snapshots.usage)
    service.handle(
        api.SNAPSHOT_REMOVE.on(name), snapshots.remove, lock=lambda r: f"snapshot/{r.key}", begins_itself=True
    )
    service.operate(
        api.SNAPSHOT_UNPACK.on(name), layers.unpack, undo=layers.undo_unpack, lock=lambda r: f"unpack/{r.name}"
    )
    service.operate(api.DIFF_APPLY, layers.apply, undo=layers.undo_apply, lock=lambda r: f"apply/{target_of(r.mounts)}")
    snapshots.reconcile()
