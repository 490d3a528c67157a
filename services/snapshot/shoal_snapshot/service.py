"""Subjects to domain: which verb is answered by what, and what it locks."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
from shoal_bus.api import snapshot as api
from shoal_bus.context import Context
from shoal_bus.errors import FailedPrecondition
from shoal_bus.harness import Service
from shoal_bus.process import Process

from shoal_snapshot.apply.pool import Pool
from shoal_snapshot.btrfs import Btrfs
from shoal_snapshot.diff.computing import Diffs
from shoal_snapshot.gc import Collection, Notice
from shoal_snapshot.layers import Layers, target_of
from shoal_snapshot.native import Native
from shoal_snapshot.overlayfs import Overlayfs
from shoal_snapshot.processors import DEFAULT_FILE, load
from shoal_snapshot.records import MIGRATIONS
from shoal_snapshot.snapshots import Snapshots
from shoal_snapshot.snapshotter import Snapshotter
from shoal_snapshot.worker import Works

log = structlog.get_logger(__name__)

SNAPSHOTTERS: tuple[type[Snapshotter], ...] = (Overlayfs, Native, Btrfs)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The service's own flags."""
    parser.add_argument(
        "--stream-processors",
        type=Path,
        default=Path(os.environ.get("SHOAL_STREAM_PROCESSORS", "") or DEFAULT_FILE),
        help=f"programs that decompress layers (default: SHOAL_STREAM_PROCESSORS, or {DEFAULT_FILE})",
    )


async def setup(process: Process) -> None:
    """Registers every verb of every snapshotter that works here, and mends what the last copy left."""
    database = process.database(MIGRATIONS)
    service = process.service("snapshots, and layers applied to them")
    pool = Pool()
    process.stack.push_async_callback(pool.close)
    processors, payloads = load(process.args.stream_processors), process.node.state / api.PAYLOADS
    every: dict[str, Layers] = {}
    for snapshotter in working(process.root):
        process.stack.push_async_callback(snapshotter.close)
        snapshots = Snapshots(database, snapshotter)
        process.stack.push_async_callback(snapshots.settled)
        every[snapshotter.name] = Layers(
            snapshots, pool, process.node.root_of("content"), process.state, processors, payloads
        )
        register(service, snapshots, every[snapshotter.name])
    works = Works()
    process.stack.push_async_callback(works.close)
    diffs = Diffs([layers.snapshots for layers in every.values()], works)

    async def each(ctx: Context, request: api.SnapshotterRequest) -> AsyncIterator[api.SnapshotterInfo]:
        for layers in every.values():
            yield layers.snapshots.described()

    def target(request: api.ApplyLayer) -> Layers:
        """The snapshotter whose directories a layer is to be applied to."""
        place = Path(target_of(request.mounts))
        owner = next((name for name, other in every.items() if other.snapshots.snapshotter.root in place.parents), "")
        return every.get(owner) or next(iter(every.values()))

    service.stream(api.SNAPSHOTTER_LIST, each)
    service.operate(
        api.DIFF_APPLY,
        lambda ctx, request: target(request).apply(ctx, request),
        undo=lambda ctx, request: target(request).undo_apply(ctx, request),
        lock=lambda r: f"apply/{target_of(r.mounts)}",
    )
    service.operate(api.DIFF_COMPUTE, diffs.compute, undo=diffs.undo)
    collection = Collection(database, {name: layers.snapshots for name, layers in every.items()})
    notice = Notice(service.client)
    service.handle(api.GC_OPEN, collection.open, lock=lambda _: "collection", begins_itself=True)
    service.stream(api.GC_LABELLED, collection.labelled)
    service.stream(api.GC_CANDIDATES, collection.candidates)
    service.handle(api.GC_SWEEP, collection.sweep, lock=lambda _: "collection", begins_itself=True)
    service.handle(api.GC_CLOSE, collection.close, lock=lambda _: "collection", begins_itself=True)
    for layers in every.values():
        layers.snapshots.on_uncovered = notice.give
        layers.snapshots.reconcile()
        service.background(layers.snapshots.settling.run(), "settling")
    service.background(notice.give_for_ever(), "notice")


def working(root: Path) -> list[Snapshotter]:
    """The snapshotters that work under a directory: each is really tried."""
    found: list[Snapshotter] = []
    for kind in SNAPSHOTTERS:
        try:
            found.append(kind(root / kind.name))
        except FailedPrecondition as error:
            log.info("snapshotter.unusable", snapshotter=kind.name, why=str(error))
    return found


def register(service: Service, snapshots: Snapshots, layers: Layers) -> None:
    """Answers one snapshotter's subjects."""
    name = snapshots.snapshotter.name

    service.handle(
        api.SNAPSHOT_PREPARE.on(name), snapshots.prepare, lock=lambda r: f"snapshot/{r.key}", begins_itself=True
    )
    service.handle(api.SNAPSHOT_VIEW.on(name), snapshots.view, lock=lambda r: f"snapshot/{r.key}", begins_itself=True)
    service.handle(
        api.SNAPSHOT_COMMIT.on(name), snapshots.commit, lock=lambda r: f"snapshot/{r.key}", begins_itself=True
    )
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
    service.handle(api.SNAPSHOT_INFO.on(name), snapshots.info)
    service.handle(
        api.SNAPSHOT_CLEANUP.on(name), snapshots.cleanup, lock=lambda _: f"cleanup/{name}", begins_itself=True
    )
    service.operate(
        api.SNAPSHOT_UNPACK.on(name), layers.unpack, undo=layers.undo_unpack, lock=lambda r: f"unpack/{r.name}"
    )
