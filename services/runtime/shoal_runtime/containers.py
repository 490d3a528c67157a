"""Container records: what would run. Plain rows; a specification may be large, so lists are read page by page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.filters import Field, compile_filters, label_field
from shoal_bus.message import Empty, now, pack, unpack
from shoal_bus.types import AnyMessage

from shoal_runtime.restart.rows import follow_labels, forget
from shoal_runtime.spec import check_spec
from shoal_runtime.spec.resources import updated

_PAGE = 32
_COLUMNS = (
    "id, image, labels, runtime, options, packed_options, snapshotter, snapshot_key, network, sandbox, extensions,"
    " created_at, updated_at"
)
_SPEC = "spec_type, spec"


class Containers:
    """The container records of every namespace."""

    def __init__(self, database: Database, default_runtime: str) -> None:
        self._db, self._default_runtime = database, default_runtime
        self._on_updated: list[Callable[[str, str], None]] = []

    def on_updated(self, callback: Callable[[str, str], None]) -> None:
        """Calls `callback` with namespace and id after each change that a client of this copy has made."""
        self._on_updated.append(callback)

    def find(self, namespace: str, id: str, *, packed: bool | None = False) -> api.Container | None:
        """The record, or None. `packed`: its specification is told as a client packed it; None: as it was given."""
        row = self._db.read_one(
            f"SELECT {_COLUMNS}, {_SPEC} FROM containers WHERE namespace = ? AND id = ?",  # noqa: S608 (constant)
            (namespace, id),
        )
        return _record(row, packed=packed) if row is not None else None

    def require(self, namespace: str, id: str, *, packed: bool | None = False) -> api.Container:
        """The record, or NOT_FOUND."""
        record = self.find(namespace, id, packed=packed)
        if record is None:
            raise NotFound(f"container {id}: not found")
        return record

    def insert(self, tx: Transaction, namespace: str, record: api.Container, request_id: str) -> None:
        """Makes the row and its event; ALREADY_EXISTS when there is one."""
        if tx.execute("SELECT 1 FROM containers WHERE namespace = ? AND id = ?", (namespace, record.id)).fetchone():
            raise AlreadyExists(f"container {record.id}: already exists", hint="remove it, or use another name")
        spec_type, spec = _stored(record)
        options = record.packed_options.pack() if record.packed_options is not None else None
        tx.execute(
            f"INSERT INTO containers (namespace, request_id, {_COLUMNS}, {_SPEC})"  # noqa: S608 (constants)
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (namespace, request_id, record.id, record.image, pack(record.labels), record.runtime, record.options.pack(),
             options, record.snapshotter, record.snapshot_key, record.network, record.sandbox,
             _pack_extensions(record), record.created_at.timestamp(), record.updated_at.timestamp(), spec_type, spec),
        )  # fmt: skip
        follow_labels(tx, namespace, record.id, record.labels)
        made = api.ContainerCreated(
            id=record.id, image=record.image,
            runtime=api.ContainerRuntime(name=record.runtime, options=record.packed_options),
        )  # fmt: skip
        tx.emit(namespace, api.CONTAINERS_CREATE, made)

    def limit(self, tx: Transaction, namespace: str, id: str, resources: dict[str, Any]) -> None:
        """Has the container's next task the limits that this one was given."""
        record = self.find(namespace, id)
        if record is not None:
            linux = record.spec.get("linux") or {}
            linux = {**linux, "resources": updated(linux.get("resources") or {}, resources)}
            self._write(tx, namespace, record.model_copy(update={"spec": {**record.spec, "linux": linux}}))

    @staticmethod
    def _write(tx: Transaction, namespace: str, record: api.Container) -> api.Container:
        """Writes what may change of a record, with its time and its event."""
        record = record.model_copy(update={"updated_at": now()})
        spec_type, spec = _stored(record)
        tx.execute(
            "UPDATE containers SET image = ?, labels = ?, snapshot_key = ?, spec_type = ?, spec = ?, extensions = ?,"
            " updated_at = ? WHERE namespace = ? AND id = ?",
            (record.image, pack(record.labels), record.snapshot_key, spec_type, spec, _pack_extensions(record),
             record.updated_at.timestamp(), namespace, record.id),
        )  # fmt: skip
        follow_labels(tx, namespace, record.id, record.labels)
        event = api.ContainerUpdated(
            id=record.id, image=record.image, labels=record.labels, snapshot_key=record.snapshot_key
        )
        tx.emit(namespace, api.CONTAINERS_UPDATE, event)
        return record

    @staticmethod
    def drop(tx: Transaction, namespace: str, id: str) -> bool:
        """Removes the row, with its event; says whether there was one."""
        gone = tx.execute("DELETE FROM containers WHERE namespace = ? AND id = ?", (namespace, id)).rowcount > 0
        if gone:
            forget(tx, namespace, id)
            tx.emit(namespace, api.CONTAINERS_DELETE, api.ContainerDeleted(id=id))
        return gone

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def create(self, ctx: Context, request: api.CreateContainer) -> api.Container:
        if request.spec is not None:
            check_spec(request.spec)
        at = now()
        given = {name: getattr(request, name) for name in type(request).model_fields if name not in ("runtime", "spec")}
        record = api.Container(
            **given, runtime=request.runtime or self._default_runtime, spec=request.spec or {}, created_at=at,
            updated_at=at,
        )  # fmt: skip
        with self._db.write() as tx:
            if tx.execute("SELECT 1 FROM runs WHERE namespace = ? AND id = ?", (ctx.namespace, request.id)).fetchone():
                raise AlreadyExists(f"container {request.id}: is just being made, or removed")
            self.insert(tx, ctx.namespace, record, ctx.id)
            told = record.model_copy(update={"packed_spec": None})
            ctx.answer(tx, told)
        return told

    async def get(self, ctx: Context, request: api.GetContainer) -> api.Container:
        return self.require(ctx.namespace, request.id, packed=request.packed)

    async def list(self, ctx: Context, request: api.ListContainers) -> AsyncIterator[api.Container]:
        """Every record that a filter matches, in the order of their ids; records made meanwhile may be missing."""
        matches = compile_filters(request.filters)
        columns = f"{_COLUMNS}, {_SPEC}" if request.specs else _COLUMNS
        after = ""
        while True:
            page = self._db.read(
                f"SELECT {columns} FROM containers WHERE namespace = ? AND id > ? ORDER BY id LIMIT {_PAGE}",  # noqa: S608
                (ctx.namespace, after),
            )
            for row in page:
                record = _record(row, packed=request.packed)
                if matches(_fields(record)):
                    yield record
            if len(page) < _PAGE:
                return
            after = page[-1]["id"]
            await asyncio.sleep(0)  # others' turn: a page of large specifications takes milliseconds

    async def update(self, ctx: Context, request: api.UpdateContainer) -> api.Container:
        with self._db.write() as tx:
            before = self.require(ctx.namespace, request.id, packed=None)
            record = _shown(self._write(tx, ctx.namespace, _updated(before, request)), packed=request.packed)
            ctx.answer(tx, record)
        for callback in self._on_updated:
            callback(ctx.namespace, request.id)
        return record

    def relabel(self, tx: Transaction, namespace: str, id: str, labels: Mapping[str, str]) -> None:
        """Sets some of a container's labels, with the event; the others stay."""
        record = self.require(namespace, id, packed=None)
        self._write(tx, namespace, record.model_copy(update={"labels": {**record.labels, **labels}}))

    async def delete(self, ctx: Context, request: api.ContainerRequest) -> Empty:
        key = (ctx.namespace, request.id)
        with self._db.write() as tx:
            if tx.execute("SELECT 1 FROM tasks WHERE namespace = ? AND id = ?", key).fetchone():
                raise FailedPrecondition(f"container {request.id}: has a task", hint="delete its task first")
            if tx.execute("SELECT 1 FROM runs WHERE namespace = ? AND id = ?", key).fetchone():
                raise FailedPrecondition(
                    f"container {request.id}: was made by a run, with a snapshot of its own", hint="remove it whole"
                )
            if not self.drop(tx, ctx.namespace, request.id):
                raise NotFound(f"container {request.id}: not found")
            ctx.answer(tx, Empty())
        return Empty()


def _updated(record: api.Container, request: api.UpdateContainer) -> api.Container:
    """`record` with the fields that `request` names, or else all that it gives."""
    # Of what shoal's own clients made, containerd's see this name.
    runtimes = (None, record.runtime) if record.packed_options is not None else (None, record.runtime, api.RUNC_V2)
    for name, possible in (("runtime", runtimes), ("snapshotter", (None, record.snapshotter))):
        if getattr(request, name) not in possible:
            raise InvalidArgument(f"container {record.id}: {name} can't be changed: it is {getattr(record, name)!r}")
    given = ["labels", "image", "snapshot_key", "spec", "extensions"]
    fields = request.fields or [name for name in given if getattr(request, name)]
    change: dict[str, Any] = {"labels": dict(record.labels), "extensions": dict(record.extensions)}
    for field in fields:
        name, dot, key = field.partition(".")
        if dot and key and name in ("labels", "extensions"):
            if key in getattr(request, name):
                change[name][key] = getattr(request, name)[key]
            else:
                change[name].pop(key, None)
        elif field in ("labels", "extensions"):
            change[field] = dict(getattr(request, field))
        elif field == "spec":
            change["packed_spec"], change["spec"] = request.packed_spec, request.spec or {}
            if request.packed_spec is None and request.spec is None:
                raise InvalidArgument("spec: named in fields, and not given")
            if request.packed_spec is None:
                check_spec(change["spec"])
        elif field in given:
            change[field] = getattr(request, field)
        else:
            raise InvalidArgument(
                f"fields: {field!r} can't be changed", hint=f"one of {', '.join(given)}, labels.<key>, extensions.<key>"
            )
    if change.get("snapshot_key") and not record.snapshotter:
        raise InvalidArgument(f"container {record.id}: a snapshot_key needs a snapshotter, and it has none")
    return record.model_copy(update=change)


def _record(row: Any, *, packed: bool | None) -> api.Container:
    options = row["packed_options"]
    record = api.Container(
        id=row["id"], image=row["image"], labels=unpack(row["labels"]), runtime=row["runtime"],
        options=api.RuncOptions.unpack(row["options"]),
        packed_options=AnyMessage.unpack(options) if options is not None else None,
        snapshotter=row["snapshotter"], snapshot_key=row["snapshot_key"], network=row["network"],
        sandbox=row["sandbox"], extensions=unpack(row["extensions"]), spec={},
        created_at=datetime.fromtimestamp(row["created_at"], UTC),
        updated_at=datetime.fromtimestamp(row["updated_at"], UTC),
    )  # fmt: skip
    if "spec" not in row.keys():  # noqa: SIM118 (a row iterates over its values)
        return record
    if row["spec_type"] is None:
        record.spec = unpack(row["spec"])
    else:
        record.packed_spec = AnyMessage(type_url=row["spec_type"], value=row["spec"])
    return _shown(record, packed=packed)


def _stored(record: api.Container) -> tuple[str | None, bytes]:
    """How a row holds the specification: its type and the bytes that a client packed, or msgpack."""
    if record.packed_spec is None:
        return None, pack(record.spec)
    return record.packed_spec.type_url, record.packed_spec.value


def _shown(record: api.Container, *, packed: bool | None) -> api.Container:
    """`record` with its specification in `packed_spec` alone, or in `spec` alone: empty where the bytes are no JSON."""
    if packed is None or packed == (record.packed_spec is not None):
        return record
    if packed:
        value = json.dumps(record.spec, separators=(",", ":")).encode()
        return record.model_copy(update={"packed_spec": AnyMessage(type_url=api.SPEC_TYPE, value=value), "spec": {}})
    assert record.packed_spec is not None
    try:
        spec = json.loads(record.packed_spec.value)
    except (ValueError, RecursionError):
        spec = {}
    return record.model_copy(update={"packed_spec": None, "spec": spec if isinstance(spec, dict) else {}})


def _pack_extensions(record: api.Container) -> bytes:
    return pack({name: extension.model_dump() for name, extension in record.extensions.items()})


def _fields(record: api.Container) -> Field:
    def field(path: Sequence[str]) -> str | None:
        match list(path):
            case ["id" | "image" | "snapshotter" | "snapshot_key" | "runtime" as name] if getattr(record, name):
                return str(getattr(record, name))
            case ["runtime", "name"]:
                return record.runtime
        return label_field(record.labels, path)

    return field
