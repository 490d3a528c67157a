"""Namespaces: there as soon as anything is in them, or when they were made by name to be labelled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import structlog
from shoal_bus.api import runtime, snapshot
from shoal_bus.api.content import (
    NAMESPACES_CREATE,
    NAMESPACES_DELETE,
    NAMESPACES_UPDATE,
    ListNamespaces,
    Namespace,
    NamespaceDeleted,
    NamespaceEvent,
    NamespaceRequest,
    SaveNamespace,
)
from shoal_bus.client import Client
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from shoal_bus.message import Empty

from shoal_content.labels import dump, load, updated

log = structlog.get_logger(__name__)

_PATIENCE_SECONDS = 1.0
_KINDS = {"images": "images", "blobs": "visible", "ingests": "ingests", "pulls under way": "pulls"}
_NAMES = (
    "SELECT namespace AS name FROM images UNION SELECT namespace FROM visible UNION SELECT namespace FROM ingests"
    " UNION SELECT name FROM namespaces"
)


class Namespaces:
    """The namespaces of one node."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def get(self, ctx: Context, request: NamespaceRequest) -> Namespace:
        """A namespace."""
        return self._get(request.name)

    async def list(self, ctx: Context, request: ListNamespaces) -> AsyncIterator[Namespace]:
        """Every namespace of the node, by name."""
        for name in sorted(self._names()):
            yield self._find(name) or Namespace(name=name)

    async def create(self, ctx: Context, request: SaveNamespace) -> Namespace:
        """Makes a namespace; one that is there only because of what is in it may still be made."""
        with self._db.write() as tx:
            if self._find(request.name) is not None:
                raise AlreadyExists(f"namespace {request.name}: is there already")
            made = Namespace(name=request.name, labels=request.labels)
            tx.execute("INSERT INTO namespaces VALUES (?, ?)", (made.name, dump(made.labels)))
            tx.emit(made.name, NAMESPACES_CREATE, NamespaceEvent(name=made.name, labels=made.labels))
            ctx.answer(tx, made)
        return made

    async def update(self, ctx: Context, request: SaveNamespace) -> Namespace:
        """Changes a namespace's labels."""
        with self._db.write() as tx:
            old = self._get(request.name)
            new = Namespace(name=old.name, labels=updated(old.labels, request.labels, request.fields))
            tx.execute(
                "INSERT INTO namespaces VALUES (?, ?) ON CONFLICT DO UPDATE SET labels = excluded.labels",
                (new.name, dump(new.labels)),
            )
            tx.emit(new.name, NAMESPACES_UPDATE, NamespaceEvent(name=new.name, labels=new.labels))
            ctx.answer(tx, new)
        return new

    async def delete(self, ctx: Context, request: NamespaceRequest) -> Empty:
        """Removes an empty namespace. FAILED_PRECONDITION names what is in it."""
        self._get(request.name)
        elsewhere = await _elsewhere(ctx.client.with_namespace(request.name))
        with self._db.write() as tx:
            inside = [*_inside(tx, request.name), *elsewhere]
            if inside:
                raise FailedPrecondition(
                    f"namespace {request.name}: isn't empty, it has {' and '.join(inside)}", hint="remove them first"
                )
            if tx.execute("DELETE FROM namespaces WHERE name = ?", (request.name,)).rowcount:
                tx.emit(request.name, NAMESPACES_DELETE, NamespaceDeleted(name=request.name))
            tx.execute("DELETE FROM leases WHERE namespace = ?", (request.name,))  # of nothing, or what is elsewhere
            ctx.answer(tx, Empty())
        return Empty()

    def _names(self) -> set[str]:
        return {row["name"] for row in self._db.read(_NAMES)}

    def _find(self, name: str) -> Namespace | None:
        row = self._db.read_one("SELECT * FROM namespaces WHERE name = ?", (name,))
        return Namespace(name=row["name"], labels=load(row["labels"])) if row is not None else None

    def _get(self, name: str) -> Namespace:
        found = self._find(name)
        if found is None and name not in self._names():
            raise NotFound(f"namespace {name}: not found")
        return found or Namespace(name=name)


def _inside(tx: Transaction, name: str) -> list[str]:
    return [
        kind
        for kind, table in _KINDS.items()
        if tx.execute(f"SELECT 1 FROM {table} WHERE namespace = ? LIMIT 1", (name,)).fetchone()  # noqa: S608
    ]


async def _elsewhere(client: Client) -> list[str]:
    """What of a namespace other services have; one that doesn't answer has nothing that could be asked for."""
    found = []
    try:
        containers = client.stream(runtime.CONTAINER_LIST, runtime.ListContainers(), patience=_PATIENCE_SECONDS)
        async with aclosing(containers) as stream:  # type: ignore[type-var]
            async for _ in stream:
                found.append("containers")
                break
        sandboxes = client.stream(runtime.SANDBOX_LIST, runtime.ListSandboxes(), patience=_PATIENCE_SECONDS)
        async with aclosing(sandboxes) as stream:  # type: ignore[type-var]
            async for _ in stream:
                found.append("sandboxes")
                break
    except Unavailable as error:
        log.info("namespaces.unasked", service="runtime", error=str(error))
    try:
        layers = client.stream(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots(), patience=_PATIENCE_SECONDS)
        async with aclosing(layers) as stream:  # type: ignore[type-var]
            async for _ in stream:
                found.append("snapshots")
                break
    except Unavailable as error:
        log.info("namespaces.unasked", service="snapshot", error=str(error))
    return found
