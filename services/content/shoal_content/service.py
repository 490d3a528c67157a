"""Subjects to domain: which verb is answered by what, and what it locks."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import structlog
from shoal_bus import image_reference as reference
from shoal_bus.api import content as api
from shoal_bus.process import Process

from shoal_content.archives.converting import Conversions
from shoal_content.archives.exporting import Exports
from shoal_content.archives.importing import Imports
from shoal_content.archives.operation import Tools
from shoal_content.archives.staging import Stagings
from shoal_content.archives.work.pool import Pool
from shoal_content.blobs.claims import Claims
from shoal_content.blobs.following import Following
from shoal_content.blobs.ingests import Ingests
from shoal_content.blobs.layout import Layout
from shoal_content.blobs.scrub import Scrub
from shoal_content.blobs.store import Store
from shoal_content.collection.collect import Collector
from shoal_content.collection.leases import Leases
from shoal_content.images.checking import Checks
from shoal_content.images.records import Images
from shoal_content.images.resolve import Resolving
from shoal_content.images.tree import Trees
from shoal_content.namespaces import Namespaces
from shoal_content.reconcile import reconcile, undo_dead_pulls
from shoal_content.registry.hosts import DEFAULT_DIRECTORY
from shoal_content.registry.registries import Registries
from shoal_content.schema import MIGRATIONS
from shoal_content.transfer.fetch import Fetcher
from shoal_content.transfer.holds import Holds
from shoal_content.transfer.pull import Pulls
from shoal_content.transfer.push import Pushes, destination
from shoal_content.transfer.snapshotters import Snapshotters
from shoal_content.transfer.unpack import Unpacker

log = structlog.get_logger(__name__)

_SWEEP_SECONDS = 20.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """What this service may be told beside what each of them is."""
    parser.add_argument(
        "--registry-config", type=Path, default=DEFAULT_DIRECTORY, help="the directory of the hosts.toml files"
    )


async def setup(process: Process) -> None:
    """Registers every verb, and mends what the last copy left."""
    database = process.database(MIGRATIONS)
    service = process.service("blobs, images, namespaces, and pulls from registries")
    layout = Layout(process.root)
    store = Store(database, layout)
    claims = Claims(database, layout, store)
    scrub = Scrub(database, layout, store, process.locks)
    trees = Trees(store)
    ingests = Ingests(database, layout, store)
    collector = Collector(database, store, ingests, layout, process.locks, service.client)
    process.stack.push_async_callback(collector.stop)
    leases = Leases(database, collector)
    images = Images(database, collector)
    resolving = Resolving(trees, images)
    holds = Holds(database, store, ingests, trees)
    fetcher = Fetcher(database, store, ingests, holds, process.locks)
    following = Following(database, layout)
    registries = Registries(
        process.args.registry_config, process.root / "registry.key", process.node.state / api.REGISTRIES
    )
    snapshotters = Snapshotters()
    pulls = Pulls(database, store, images, holds, fetcher, following, collector, registries, snapshotters)
    pushes = Pushes(database, store, images, holds, registries)
    namespaces = Namespaces(database)
    pool = Pool()
    process.stack.push_async_callback(pool.close)
    stagings = Stagings(process.root, database, store, holds)
    unpacker = Unpacker(store, following, holds, snapshotters)
    tools = Tools(
        database, store, trees, images, holds, collector, stagings, unpacker, pool, process.node.state / api.ARCHIVES
    )
    checks, imports, exports, conversions = Checks(tools), Imports(tools), Exports(tools), Conversions(tools)

    service.handle(api.BLOB_INFO, store.info)
    service.stream(api.BLOB_LIST, store.list)
    service.stream(api.BLOB_READ, store.read)
    service.handle(api.BLOB_CLAIM, claims.claim)
    service.handle(api.BLOB_UPDATE, store.update, lock=lambda r: f"blob/{r.digest}", begins_itself=True)
    service.handle(api.BLOB_DELETE, store.delete, lock=lambda r: f"blob/{r.digest}", begins_itself=True)
    service.operate(api.BLOB_SCRUB, scrub.scrub, undo=scrub.undo, lock=lambda _: "scrub")
    service.handle(api.INGEST_OPEN, ingests.open, lock=lambda r: f"ingest/{r.ref}", begins_itself=True)
    # Recording a request with its payload first would write every byte twice.
    service.handle(api.INGEST_WRITE, ingests.write, lock=lambda r: f"ingest/{r.ref}", begins_itself=True)
    service.handle(api.INGEST_ADVANCE, ingests.advance)
    service.handle(api.INGEST_RELEASE, ingests.release, lock=lambda r: f"ingest/{r.ref}", begins_itself=True)
    service.handle(api.INGEST_STATUS, ingests.status)
    service.stream(api.INGEST_LIST, ingests.list)
    service.handle(api.INGEST_ABORT, ingests.abort, lock=lambda r: f"ingest/{r.ref}", begins_itself=True)
    service.handle(api.IMAGE_GET, images.get)
    service.stream(api.IMAGE_LIST, images.list)
    service.handle(api.IMAGE_CREATE, images.create, lock=lambda r: f"image/{r.name}", begins_itself=True)
    service.handle(api.IMAGE_UPDATE, images.update, lock=lambda r: f"image/{r.name}", begins_itself=True)
    service.handle(api.IMAGE_DELETE, images.delete, lock=lambda r: f"image/{r.name}", begins_itself=True)
    service.handle(api.IMAGE_RESOLVE, resolving.resolve)
    service.handle(api.IMAGE_TAG, images.tag, lock=lambda r: f"image/{r.name}", begins_itself=True)
    service.handle(api.IMAGE_CHECK, checks.check)
    service.handle(api.IMAGE_USAGE, checks.usage)
    service.operate(api.IMAGE_UNPACK, checks.unpack, undo=checks.undo_unpack)
    service.operate(api.IMAGE_IMPORT, imports.run, undo=imports.undo)
    service.operate(api.IMAGE_EXPORT, exports.run, undo=exports.undo)
    service.operate(api.IMAGE_CONVERT, conversions.run, undo=conversions.undo)
    # Not the image's own lock: whoever deletes it meanwhile needn't wait for the end of a pull.
    service.operate(api.IMAGE_PULL, pulls.pull, undo=pulls.undo, lock=lambda r: f"pull/{reference.parse(r.name)}")
    service.operate(api.IMAGE_PUSH, pushes.push, undo=pushes.undo, lock=lambda r: f"push/{destination(r)}")
    service.handle(api.REGISTRY_KEY, registries.key)
    service.stream(api.REFERRER_LIST, registries.referrers)
    service.handle(api.LEASE_CREATE, leases.create, lock=lambda r: f"lease/{r.id}", begins_itself=True)
    service.handle(api.LEASE_DELETE, leases.delete, lock=lambda r: f"lease/{r.id}", begins_itself=True)
    service.handle(api.LEASE_GET, leases.get)
    service.stream(api.LEASE_LIST, leases.list)
    service.handle(api.LEASE_ADD, leases.add, lock=lambda r: f"lease/{r.lease}", begins_itself=True)
    service.handle(api.LEASE_REMOVE, leases.remove, lock=lambda r: f"lease/{r.lease}", begins_itself=True)
    service.stream(api.LEASE_RESOURCES, leases.resources)
    service.handle(api.NODE_GC, collector.gc, lock=lambda r: f"gc/{'soon' if r.soon else 'now'}")
    service.handle(api.NAMESPACE_GET, namespaces.get)
    service.stream(api.NAMESPACE_LIST, namespaces.list)
    service.handle(api.NAMESPACE_CREATE, namespaces.create, lock=lambda r: f"namespace/{r.name}", begins_itself=True)
    service.handle(api.NAMESPACE_UPDATE, namespaces.update, lock=lambda r: f"namespace/{r.name}", begins_itself=True)
    service.handle(api.NAMESPACE_DELETE, namespaces.delete, lock=lambda r: f"namespace/{r.name}", begins_itself=True)
    reconcile(database, layout, holds, following, scrub)
    claims.reconcile()
    service.background(_sweep(holds, stagings, following, claims, collector), "sweep")
    service.background(collector.run_for_ever(), "collection")
    service.background(scrub.run(), "scrub")


async def _sweep(holds: Holds, stagings: Stagings, following: Following, claims: Claims, collector: Collector) -> None:
    """Now and then, removes what has expired, and undoes what couldn't be undone when it failed."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        try:
            claims.expire()
            undo_dead_pulls(holds)
            following.sweep()
            await stagings.sweep()
            collector.look_again()
        except Exception:
            log.exception("sweep.failed")
