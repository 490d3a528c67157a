"""The mount manager's verbs, and what tasks have activated of their root file systems.

Everything that changes an activation is done under its lock. The row is written before the first mount and says where
it is made; whoever holds the lock and finds a row that isn't `made` knows that nobody is at work on it any more, and
takes away what there is.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import structlog
from shoal_bus.api import content
from shoal_bus.api import runtime as api
from shoal_bus.collection import BACK_REFERENCE
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import AlreadyExists, InvalidArgument, NotFound, ShoalError, Unimplemented
from shoal_bus.filters import Field, compile_filters, label_field
from shoal_bus.locks import Locks
from shoal_bus.message import Empty, unpack
from shoal_bus.together import in_thread
from shoal_bus.types import Labels, Mount

from shoal_runtime.mount_manager.places import Places
from shoal_runtime.mount_manager.plan import Plan, may_need_one, plan_of
from shoal_runtime.mount_manager.rows import Rows, activation_of, active_of, system_of

log = structlog.get_logger(__name__)

_PAGE = 32
_PATIENCE_SECONDS = 5.0


def lock_of(name: str) -> str:
    """The lock of one activation."""
    return f"mount/{name}"


def lock_key(namespace: str, name: str) -> str:
    """The same, as the harness names it among those of all namespaces."""
    return f"{namespace} {lock_of(name)}"


class MountManager:
    """The activations of every namespace."""

    def __init__(self, database: Database, locks: Locks, places: Places) -> None:
        self._db, self._locks, self._places = database, locks, places
        self._rows = Rows(database)

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def activate(self, ctx: Context, request: api.ActivateMounts) -> api.Activation:
        plan = plan_of(request.mounts, temporary=request.temporary, allowed=request.allow_mount_types)
        if plan is None:
            raise Unimplemented("nothing to activate: these mounts can be mounted as they are")
        found = self._find(ctx.namespace, request.name)
        if found is not None and found["request_id"] == ctx.id:
            return activation_of(found)
        if found is not None:
            raise AlreadyExists(f"mount {request.name}: is active already", hint="deactivate it first")
        if ctx.lease:
            await ctx.call(
                content.LEASE_GET, content.LeaseRequest(id=ctx.lease), step="lease", patience=_PATIENCE_SECONDS
            )
        labels = {key: value for key, value in request.labels.items() if value}
        return await self._make(ctx, request.name, plan, labels, ctx.lease, answers=True)

    async def deactivate(self, ctx: Context, request: api.MountRequest) -> Empty:
        row = self._rows.find(ctx.namespace, request.name)
        if row is None and not ctx.resumed:
            raise NotFound(f"mount {request.name}: not found")
        if row is not None:
            await self._take_away(row, begin=ctx)
        return Empty()

    async def info(self, ctx: Context, request: api.MountRequest) -> api.Activation:
        return activation_of(self._require(ctx.namespace, request.name))

    async def list(self, ctx: Context, request: api.ListMounts) -> AsyncIterator[api.Activation]:
        """Every activation that a filter matches, by name; those made meanwhile may be missing."""
        matches = compile_filters(request.filters)
        after = ""
        while page := self._rows.page(ctx.namespace, after, _PAGE):
            for activation in map(activation_of, page):
                if matches(_fields(activation)):
                    yield activation
            after = page[-1]["name"]
            await asyncio.sleep(0)  # others' turn

    async def update(self, ctx: Context, request: api.UpdateMount) -> api.Activation:
        with self._db.write() as tx:
            row = self._require(ctx.namespace, request.name)
            self._rows.relabel(tx, ctx.namespace, request.name, _relabelled(unpack(row["labels"]), request))
            activation = activation_of(self._require(ctx.namespace, request.name))
            ctx.answer(tx, activation)
        return activation

    # -------------------------------------------------------------------------------------------------------- for tasks

    async def for_task(self, ctx: Context, id: str, rootfs: Sequence[Mount]) -> Sequence[Mount]:
        """What a shim is to mount for a task whose root file system is asked for as `rootfs`.

        It is activated under the container's id where it needs to be; an activation of that name is used as it is.
        """
        plan = plan_of(rootfs) if may_need_one(rootfs) else None
        if plan is None:
            return rootfs
        async with self._locks.hold(lock_key(ctx.namespace, id)):
            found = self._find(ctx.namespace, id)
            if found is not None:
                self._rows.use(ctx.namespace, id)
                return system_of(found)
            made = await self._make(ctx, id, plan, {f"{BACK_REFERENCE}container": id}, "")
        return made.system

    async def end(self, namespace: str, id: str, *, made_by: str | None = None) -> None:
        """Takes away what is active under a container's id: its task is gone; with `made_by`, only that request's.

        What can't be taken away is logged, and tried again later: it is no reason to keep the task.
        """
        if self._rows.find(namespace, id) is None:
            return
        async with self._locks.hold(lock_key(namespace, id)):
            row = self._rows.find(namespace, id)
            if row is None or made_by not in (None, row["request_id"]):
                return
            try:
                await self._take_away(row)
            except (OSError, ShoalError) as error:
                log.error("mounts.not_deactivated", namespace=namespace, name=id, error=str(error))

    # ---------------------------------------------------------------------------------------------------- what was left

    async def reconcile(self) -> None:
        """At start: takes away what isn't whole, by rows and by places, but for what a living copy is at work on."""
        for row in self._rows.all():
            await self._mend(row["namespace"], row["name"])
        for place in await asyncio.to_thread(self._places.all):
            # A row comes before its place, so one without a row is nobody's.
            if not self._db.read("SELECT 1 FROM mounts WHERE place = ?", (place,)):
                try:
                    await in_thread(self._places.take_down, place)
                    log.warning("mounts.stray_removed", place=place)
                except OSError:
                    log.exception("mounts.stray_not_removed", place=place)

    async def _mend(self, namespace: str, name: str) -> None:
        key = lock_key(namespace, name)
        if not self._locks.try_acquire(key):
            return
        try:
            row = self._rows.find(namespace, name)
            if row is None:
                return
            if row["state"] == "made" and await asyncio.to_thread(self._places.are_there, active_of(row)):
                return
            await self._take_away(row)
            log.warning("mounts.mended", namespace=namespace, name=name, was=row["state"])
        except (OSError, ShoalError):
            log.exception("mounts.not_mended", namespace=namespace, name=name)
        finally:
            self._locks.release(key)

    async def take_away_unused(self, namespace: str, name: str, may_go: Callable[[Any], bool]) -> bool:
        """Takes an activation away that nobody is at work on, if its row still says it `may_go`; whether it did."""
        key = lock_key(namespace, name)
        if not self._locks.try_acquire(key):
            return False
        try:
            row = self._rows.find(namespace, name)
            if row is None or not may_go(row):
                return False
            await self._take_away(row)
            return True
        except (OSError, ShoalError):
            log.exception("mounts.not_collected", namespace=namespace, name=name)
            return False
        finally:
            self._locks.release(key)

    # -------------------------------------------------------------------------------------------------------- its steps

    def _find(self, namespace: str, name: str) -> Any | None:
        """The row of an activation that is made."""
        row = self._rows.find(namespace, name)
        return row if row is not None and row["state"] == "made" else None

    def _require(self, namespace: str, name: str) -> Any:
        row = self._find(namespace, name)
        if row is None:
            raise NotFound(f"mount {name}: not found")
        return row

    async def _make(
        self, ctx: Context, name: str, plan: Plan, labels: Labels, lease: str, *, answers: bool = False
    ) -> api.Activation:
        left = self._rows.find(ctx.namespace, name)
        if left is not None:
            await self._take_away(left)
        place = secrets.token_hex(4)
        self._rows.begin(ctx, name, place, lease, labels)
        try:
            active, system = await in_thread(self._places.carry_out, place, plan)
        except Exception:
            if not self._places.is_there(place):
                self._rows.drop(ctx.namespace, name)
            raise
        with self._db.write() as tx:
            activation = self._rows.made(tx, ctx.namespace, name, active, system)
            if answers:
                ctx.answer(tx, activation)
        return activation

    async def _take_away(self, row: Any, *, begin: Context | None = None) -> None:
        """Takes an activation away, its row last; its lock is held. `begin`: as the work of that request."""
        self._rows.remove(row["namespace"], row["name"], begin)
        await in_thread(self._places.take_down, row["place"])
        self._rows.drop(row["namespace"], row["name"])


def _relabelled(labels: Labels, request: api.UpdateMount) -> Labels:
    """Labels as a request changes them. INVALID_ARGUMENT for a field that can't be changed."""
    labels = dict(labels)
    for field in request.fields or ["labels"]:
        name, _, key = field.partition(".")
        if field == "labels":
            labels = dict(request.labels)
        elif name == "labels" and key:
            labels[key] = request.labels.get(key, "")
        else:
            raise InvalidArgument(f"cannot update {field!r} field on mount {request.name!r}")
    return {key: value for key, value in labels.items() if value}


def _fields(activation: api.Activation) -> Field:
    def field(path: Sequence[str]) -> str | None:
        return activation.name if list(path) == ["name"] else label_field(activation.labels, path)

    return field
