"""Leases: they hold blobs, images, ingests and snapshots by name, whether these are there already or will be.

What a request makes that carries a lease is added to it in the transaction that makes it (`leasing`); what another
service makes is added before it is made (`LEASE_ADD`).
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from shoal_bus.api import snapshot as snapshots
from shoal_bus.api.content import (
    ChangeLease,
    CreateLease,
    DeleteLease,
    Lease,
    LeaseRequest,
    LeaseResource,
    ListLeases,
)
from shoal_bus.client import Client
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import AlreadyExists, NotFound
from shoal_bus.filters import compile_filters, label_field
from shoal_bus.message import Empty

from shoal_content.collection.collect import Collector
from shoal_content.labels import dump, load
from shoal_content.leasing import attach, drop, forget_ingests

_PAGE = 500
_TOUCH_SECONDS = 5.0


class Leases:
    """The leases of one node."""

    def __init__(self, database: Database, collector: Collector) -> None:
        self._db, self._collector = database, collector

    async def create(self, ctx: Context, request: CreateLease) -> Lease:
        """Makes a lease. ALREADY_EXISTS."""
        id = request.id or secrets.token_hex(12)
        with self._db.write() as tx:
            if self._find(ctx.namespace, id) is not None:
                raise AlreadyExists(f"lease {id}: is there already")
            tx.execute("INSERT INTO leases VALUES (?, ?, ?, ?)", (ctx.namespace, id, dump(request.labels), time.time()))
            lease = self._require(ctx.namespace, id)
            ctx.answer(tx, lease)
        self._collector.look_again()  # it may expire before anything else is due
        return lease

    async def delete(self, ctx: Context, request: DeleteLease) -> Empty:
        """Ends a lease; what only it held is collected."""
        with self._db.write() as tx:
            self._require(ctx.namespace, request.id)
            drop(tx, ctx.namespace, request.id)
            ctx.answer(tx, Empty())
        await self._collector.after_deletion(wait=request.sync)
        return Empty()

    async def get(self, ctx: Context, request: LeaseRequest) -> Lease:
        """A lease."""
        return self._require(ctx.namespace, request.id)

    async def list(self, ctx: Context, request: ListLeases) -> AsyncIterator[Lease]:
        """The leases of the namespace that match, by id."""
        matches = compile_filters(request.filters)
        after = ""
        while rows := self._db.read(
            "SELECT * FROM leases WHERE namespace = ? AND id > ? ORDER BY id LIMIT ?", (ctx.namespace, after, _PAGE)
        ):
            for lease in map(_lease, rows):
                if matches(lambda path, lease=lease: _field(lease, path)):  # type: ignore[misc]
                    yield lease
            after = rows[-1]["id"]

    async def add(self, ctx: Context, request: ChangeLease) -> Empty:
        """Adds a resource to a lease."""
        with self._db.write() as tx:
            attach(tx, ctx.namespace, request.lease, request.type, request.id)
            sweeping = tx.execute("SELECT 1 FROM collection WHERE open").fetchone() is not None
            ctx.answer(tx, Empty())
        kind, _, snapshotter = request.type.partition("/")
        if sweeping and kind == "snapshots":
            await _touch(ctx.client, snapshotter, request.id)
        return Empty()

    async def remove(self, ctx: Context, request: ChangeLease) -> Empty:
        """Takes a resource from a lease; one that it doesn't hold is no error."""
        with self._db.write() as tx:
            self._require(ctx.namespace, request.lease)
            forget_ingests(tx, ctx.namespace, request.lease, request.type, request.id)
            tx.execute(
                "DELETE FROM lease_resources WHERE namespace = ? AND lease = ? AND type = ? AND id = ?",
                (ctx.namespace, request.lease, request.type, request.id),
            )
            ctx.answer(tx, Empty())
        await self._collector.after_deletion(wait=False)
        return Empty()

    async def resources(self, ctx: Context, request: LeaseRequest) -> AsyncIterator[LeaseResource]:
        """What a lease holds by name."""
        self._require(ctx.namespace, request.id)
        for row in self._db.read(
            "SELECT type, id FROM lease_resources WHERE namespace = ? AND lease = ? ORDER BY type, id",
            (ctx.namespace, request.id),
        ):
            yield LeaseResource(type=row["type"], id=row["id"])

    def _find(self, namespace: str, id: str) -> Lease | None:
        row = self._db.read_one("SELECT * FROM leases WHERE namespace = ? AND id = ?", (namespace, id))
        return _lease(row) if row is not None else None

    def _require(self, namespace: str, id: str) -> Lease:
        lease = self._find(namespace, id)
        if lease is None:
            raise NotFound(f"lease {id}: not found")
        return lease


async def _touch(client: Client, snapshotter: str, key: str) -> None:
    """Has a sweep that is under way leave a snapshot that has just been leased, if it is there."""
    with suppress(NotFound):
        stat = snapshots.SNAPSHOT_STAT.on(snapshotter)
        await client.call(stat, snapshots.SnapshotRequest(key=key), patience=_TOUCH_SECONDS)


def _lease(row: sqlite3.Row) -> Lease:
    return Lease(
        id=row["id"], created_at=datetime.fromtimestamp(row["created_at"], UTC), labels=load(row["labels"])
    )  # fmt: skip


def _field(lease: Lease, path: Sequence[str]) -> str | None:
    return lease.id if list(path) == ["id"] else label_field(lease.labels, path)
