"""Sandbox records: plain rows, and what is in them is their owner's. Lists are read page by page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import AlreadyExists, InvalidArgument, NotFound
from shoal_bus.filters import Field, compile_filters, label_field
from shoal_bus.message import Empty, now, pack

_PAGE = 32
_REPLACED = ("labels", "extensions", "spec", "runtime")
"""What an update without fields replaces."""


def lock_of(id: str) -> str:
    """The lock of a record: not that of what runs, which may be held for as long as that takes to end."""
    return f"stored-sandbox/{id}"


class SandboxStore:
    """The sandbox records of every namespace."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def require(self, namespace: str, id: str) -> api.Sandbox:
        """The record, or NOT_FOUND."""
        row = self._db.read_one("SELECT * FROM sandboxes WHERE namespace = ? AND id = ?", (namespace, id))
        if row is None:
            raise NotFound(f"sandbox {id}: not found")
        return api.Sandbox.unpack(row["record"])

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def create(self, ctx: Context, request: api.CreateSandbox) -> api.Sandbox:
        at = now()
        record = api.Sandbox(**request.model_dump(), created_at=at, updated_at=at)
        key = (ctx.namespace, request.id)
        with self._db.write() as tx:
            if tx.execute("SELECT 1 FROM sandboxes WHERE namespace = ? AND id = ?", key).fetchone():
                raise AlreadyExists(f"sandbox {request.id}: already exists")
            tx.execute("INSERT INTO sandboxes VALUES (?, ?, ?, ?)", (*key, pack(record.labels), record.pack()))
            ctx.answer(tx, record)
        return record

    async def get(self, ctx: Context, request: api.SandboxRequest) -> api.Sandbox:
        return self.require(ctx.namespace, request.id)

    async def list(self, ctx: Context, request: api.ListSandboxes) -> AsyncIterator[api.Sandbox]:
        """Every record that a filter matches, in the order of their ids; records made meanwhile may be missing."""
        matches = compile_filters(request.filters)
        after = ""
        while True:
            page = self._db.read(
                f"SELECT * FROM sandboxes WHERE namespace = ? AND id > ? ORDER BY id LIMIT {_PAGE}",  # noqa: S608
                (ctx.namespace, after),
            )
            for row in page:
                record = api.Sandbox.unpack(row["record"])
                if matches(_fields(record)):
                    yield record
            if len(page) < _PAGE:
                return
            after = page[-1]["id"]
            await asyncio.sleep(0)  # others' turn

    async def update(self, ctx: Context, request: api.UpdateSandbox) -> api.Sandbox:
        with self._db.write() as tx:
            old = self.require(ctx.namespace, request.id)
            record = _updated(old, request).model_copy(update={"updated_at": now()})
            tx.execute(
                "UPDATE sandboxes SET labels = ?, record = ? WHERE namespace = ? AND id = ?",
                (pack(record.labels), record.pack(), ctx.namespace, request.id),
            )
            ctx.answer(tx, record)
        return record

    async def delete(self, ctx: Context, request: api.SandboxRequest) -> Empty:
        with self._db.write() as tx:
            key = (ctx.namespace, request.id)
            if not tx.execute("DELETE FROM sandboxes WHERE namespace = ? AND id = ?", key).rowcount:
                raise NotFound(f"sandbox {request.id}: not found")
            ctx.answer(tx, Empty())
        return Empty()


def _updated(record: api.Sandbox, request: api.UpdateSandbox) -> api.Sandbox:
    """`record` with the fields that `request` names."""
    if not request.fields and request.runtime.name != record.runtime.name:
        raise InvalidArgument(f"sandbox {record.id}: runtime.name can't be changed")
    change: dict[str, Any] = {"labels": dict(record.labels), "extensions": dict(record.extensions)}
    for field in request.fields or _REPLACED:
        name, _, key = field.partition(".")
        if field in _REPLACED:
            change[field] = getattr(request, field)
        elif key and name in ("labels", "extensions"):
            given = getattr(request, name).get(key)
            if given:
                change[name][key] = given
            else:
                change[name].pop(key, None)
        else:
            raise InvalidArgument(f"cannot update {field!r} field on sandbox {record.id!r}")
    change["labels"] = {key: value for key, value in change["labels"].items() if value}
    return record.model_copy(update=change)


def _fields(record: api.Sandbox) -> Field:
    def field(path: Sequence[str]) -> str | None:
        return record.id if list(path) == ["id"] else label_field(record.labels, path)

    return field
