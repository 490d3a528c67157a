"""Tasks: a container's process from its creation to its removal, and the events that say so, in order and once.

    creating ──► created ──► running ──► stopped ──► (deleted)
                    └────────────────────►┘

A row is written before a shim is asked for anything, and says what it is asked; so whoever finds it (the same request,
resumed; a reconciliation) knows what may be there. Every method that changes a task is called with its container's lock
held. Exits come by themselves, from `exits`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence

import structlog
from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from shoal_bus.filters import Field, compile_filters
from shoal_bus.message import now, pack
from shoal_bus.types import Mount, Stdio

from shoal_runtime import checkpoints
from shoal_runtime.bundles import Bundles
from shoal_runtime.containers import Containers
from shoal_runtime.execs import Execs
from shoal_runtime.exits import KILLED, Exits, exit_of
from shoal_runtime.groups import group_of
from shoal_runtime.mount_manager import MountManager
from shoal_runtime.processes import Processes, row_of, task_of
from shoal_runtime.runtimes import require_runtime
from shoal_runtime.shims import ExitRecord
from shoal_runtime.spec import check_spec, fit_to_host
from shoal_runtime.supervisor import Supervisor
from shoal_runtime.takedown import remove_cgroups

log = structlog.get_logger(__name__)

_PAGE = 256


class Tasks:
    """The tasks of every namespace."""

    def __init__(
        self,
        database: Database,
        containers: Containers,
        supervisor: Supervisor,
        exits: Exits,
        bundles: Bundles,
        mounts: MountManager,
    ) -> None:
        self._db, self._containers, self._supervisor = database, containers, supervisor
        self._exits, self._bundles, self._mounts = exits, bundles, mounts
        self.processes = Processes(database, containers, exits)
        self.execs = Execs(self.processes, database, containers, supervisor, exits)

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def create(self, ctx: Context, request: api.CreateTask) -> api.Task:
        return await self.begin(
            ctx, request.container_id, request.rootfs, request.stdio, runtime=request.runtime,
            options=request.options, checkpoint=request.checkpoint, checkpoint_blob=request.checkpoint_blob or "",
            answers=True,
        )  # fmt: skip

    async def start(self, ctx: Context, request: api.ProcessRequest) -> api.Task:
        if request.exec_id:
            return await self.execs.start(ctx, request.container_id, request.exec_id)
        return await self.begin_to_run(ctx, request.container_id)

    async def wait(self, ctx: Context, request: api.WaitTask) -> api.Exit:
        return await self._exits.wait(ctx.namespace, request.container_id, request.exec_id, request.pid)

    async def delete(self, ctx: Context, request: api.DeleteTask) -> api.Exit:
        if request.exec_id:
            return await self.execs.delete(ctx, request.container_id, request.exec_id, request.force)
        row = self.processes.require(ctx.namespace, request.container_id)
        if row["status"] == "creating":
            await self.undo_creation(ctx.namespace, request.container_id)
            raise NotFound(f"container {request.container_id}: has no task")
        if row["status"] not in ("created", "stopped") and not request.force:
            raise FailedPrecondition(
                f"container {request.container_id}: its task must be stopped before deletion: it is {row['status']}",
                hint="kill it first, or force it",
            )
        return await self.end(ctx.namespace, request.container_id, answer=ctx)

    async def get(self, ctx: Context, request: api.ProcessRequest) -> api.Task:
        return task_of(self.processes.require(ctx.namespace, request.container_id, request.exec_id))

    async def list(self, ctx: Context, request: api.ListTasks) -> AsyncIterator[api.Task]:
        """Every task that a filter matches, in the order of their ids."""
        matches = compile_filters(request.filters)
        after = ""
        while True:
            page = self._db.read(
                f"SELECT * FROM tasks WHERE namespace = ? AND id > ? AND exec_id = '' ORDER BY id LIMIT {_PAGE}",  # noqa: S608
                (ctx.namespace, after),
            )
            for row in page:
                task = task_of(row)
                if matches(_fields(task)):
                    yield task
            if len(page) < _PAGE:
                return
            after = page[-1]["id"]
            await asyncio.sleep(0)

    # --------------------------------------------------------------------------------------------------- creating one

    async def begin(
        self,
        ctx: Context,
        id: str,
        rootfs: Sequence[Mount],
        stdio: Stdio,
        *,
        runtime: str = "",
        options: api.RuncOptions | None = None,
        checkpoint: str = "",
        checkpoint_blob: str = "",
        answers: bool = False,
    ) -> api.Task:
        """Creates a task, as a step of the request `ctx`; undone if it fails. `answers`: the task is its answer."""
        container = self._containers.require(ctx.namespace, id)
        chosen = options or _options_of(container)
        program = require_runtime(chosen.binary_name or runtime or container.runtime)
        check_spec(container.spec)
        if checkpoint and not os.path.isdir(checkpoint):  # noqa: PTH112, ASYNC240 (a moment)
            raise NotFound(f"checkpoint {checkpoint}: there is no such directory")
        found = self.processes.find(ctx.namespace, id)
        if found is not None and found["status"] == "creating" and not self.processes.is_begun(found["request_id"]):
            await self.undo_creation(ctx.namespace, id)
            found = None
        if found is not None and found["request_id"] == ctx.id and found["status"] != "creating":
            return task_of(found)  # a resumed run has come further than this step
        if found is not None and found["request_id"] != ctx.id:
            raise AlreadyExists(f"container {id}: has a task already", hint="delete it first")
        bundle = self._bundles.path(ctx.namespace, id)
        if checkpoint_blob:
            checkpoint = str(checkpoints.fetched_to(bundle))
        with self._db.write() as tx:
            ctx.begin(tx)
            self._exits.forget(tx, ctx.namespace, id)
            tx.execute(
                "INSERT OR IGNORE INTO tasks (namespace, id, request_id, status, bundle, rootfs, stdio, checkpoint)"
                " VALUES (?, ?, ?, 'creating', ?, ?, ?, ?)",
                (ctx.namespace, id, ctx.id, str(bundle), pack([m.model_dump() for m in rootfs]), stdio.pack(),
                 checkpoint),
            )  # fmt: skip
        try:
            self._bundles.make(ctx.namespace, id, fit_to_host(container.spec), program)
            if checkpoint_blob:
                await checkpoints.fetch(ctx.client, checkpoint_blob, bundle)
            rootfs = await self._mounts.for_task(ctx, id, rootfs)
            pid = await self._make(ctx, container, rootfs, stdio, program, chosen, checkpoint)
        except Exception:
            # A cancelled one (this copy stops) stays, for the copy that resumes it.
            await self.undo_creation(ctx.namespace, id)
            raise
        with self._db.write() as tx:
            tx.execute(
                "UPDATE tasks SET status = 'created', pid = ? WHERE namespace = ? AND id = ? AND exec_id = ''",
                (pid, ctx.namespace, id),
            )
            io = api.TaskIO(**stdio.model_dump())
            created = api.TaskCreated(
                container_id=id, bundle=str(bundle), rootfs=[*rootfs], io=io, checkpoint=checkpoint, pid=pid
            )
            tx.emit(ctx.namespace, api.TASKS_CREATE, created)
            exit = self._exits.settle(tx, ctx.namespace, id)
            task = task_of(row_of(tx, ctx.namespace, id))
            if answers:
                ctx.answer(tx, task)
        if exit is not None:
            self._exits.announce(ctx.namespace, exit)
        return task

    async def _make(
        self,
        ctx: Context,
        container: api.Container,
        rootfs: Sequence[Mount],
        stdio: Stdio,
        program: str,
        options: api.RuncOptions,
        checkpoint: str,
    ) -> int:
        for last in (False, True):
            try:
                return await self._supervisor.create(
                    ctx.namespace, container.id, bundle=self._bundles.path(ctx.namespace, container.id),
                    rootfs=[*rootfs], runtime=program, stdio=stdio, request_id=ctx.id,
                    options=options.model_dump(exclude_defaults=True), group=group_of(container.spec),
                    checkpoint=checkpoint,
                )  # fmt: skip
            except Unavailable as error:  # it has just removed what a dead shim left in this place
                if last:
                    raise
                ctx.log.info("task.create_again", container=container.id, error=str(error))
        raise AssertionError("unreachable")

    async def undo_creation(self, namespace: str, id: str) -> None:
        """Takes back what a create that can't succeed has done. Nothing of it was told, so nothing is told now."""
        await self._supervisor.delete(namespace, id, force=True)
        await asyncio.to_thread(remove_cgroups, str(self._bundles.path(namespace, id)))
        await self._bundles.discard(namespace, id)
        row = self.processes.find(namespace, id)
        if row is not None:  # what was active before stays
            await self._mounts.end(namespace, id, made_by=row["request_id"])
        with self._db.write() as tx:
            tx.execute(
                "DELETE FROM tasks WHERE namespace = ? AND id = ? AND exec_id = '' AND status = 'creating'",
                (namespace, id),
            )

    # --------------------------------------------------------------------------------------------------- starting one

    async def begin_to_run(self, ctx: Context, id: str) -> api.Task:
        """Starts a created task and answers `ctx` with it."""
        row = self.processes.require(ctx.namespace, id)
        again = row["start_request"] == ctx.id
        if row["status"] != "created" or (row["start_request"] and not again):
            if row["status"] == "creating":
                raise FailedPrecondition(f"container {id}: its task is just being created")
            raise FailedPrecondition(f"container {id}: its task has been started already, and is {row['status']}")
        self.processes.set_start(ctx, id, "")
        pid = row["pid"]
        try:
            status = await self._status(ctx.namespace, id) if again else "created"
            if status == "created":
                pid = await self._supervisor.start_task(ctx.namespace, id)
        except Exception:
            self.processes.unstart(ctx.namespace, id, "")
            raise
        with self._db.write() as tx:
            tx.execute(
                "UPDATE tasks SET status = 'running', pid = ? WHERE namespace = ? AND id = ? AND exec_id = ''",
                (pid, ctx.namespace, id),
            )
            tx.emit(ctx.namespace, api.TASKS_START, api.TaskStarted(container_id=id, pid=pid))
            exit = self._exits.settle(tx, ctx.namespace, id)
            if exit is None and status == "gone":
                lost = ExitRecord(ctx.namespace, id, pid, KILLED, now())
                exit = self._exits.record(tx, lost)
            task = task_of(row_of(tx, ctx.namespace, id))
            ctx.answer(tx, task)
        if exit is not None:
            self._exits.announce(ctx.namespace, exit)
        return task

    async def _status(self, namespace: str, id: str) -> str:
        """The shim's word, for a start that a dead copy began: it may have come through, and be over."""
        try:
            return str((await self._supervisor.state(namespace, id))["status"])
        except NotFound:
            return "gone"

    # --------------------------------------------------------------------------------------------------- ending one

    async def end(self, namespace: str, id: str, *, keep: bool = False, answer: Context | None = None) -> api.Exit:
        """Removes a task and everything it held, and tells; what runs is killed. May be repeated after a crash.

        `keep` remembers the exit for who still waits; `answer` is the request that this is the answer of.
        """
        record = await self._supervisor.delete(namespace, id, force=True)
        await self._bundles.discard(namespace, id)
        await self._mounts.end(namespace, id)
        told: api.Exit | None = None
        with self._db.write() as tx:
            row = row_of(tx, namespace, id)
            lost = self.execs.end_all(tx, namespace, id)
            if row["status"] != "stopped":
                tx.execute(
                    "UPDATE tasks SET start_request = '' WHERE namespace = ? AND id = ? AND exec_id = ''",
                    (namespace, id),
                )
                exited = record or ExitRecord(namespace, id, row["pid"], KILLED, now())
                if row["exited_at"] is None or row["exit_pid"] != row["pid"]:
                    told = self._exits.record(tx, exited)
                else:
                    told = self._exits.settle(tx, namespace, id)
                row = row_of(tx, namespace, id)
            exit = exit_of(row)
            tx.execute("DELETE FROM tasks WHERE namespace = ? AND id = ?", (namespace, id))
            gone = api.TaskDeleted(
                container_id=id, pid=exit.pid, exit_status=exit.exit_status, exited_at=exit.exited_at
            )
            tx.emit(namespace, api.TASKS_DELETE, gone)
            if keep:
                self._exits.keep(tx, namespace, exit)
            if answer is not None:
                answer.answer(tx, exit)
        for ended in [*lost, *([told] if told is not None else [])]:
            self._exits.announce(namespace, ended)
        return exit


def _options_of(container: api.Container) -> api.RuncOptions:
    """Its own options; INVALID_ARGUMENT for some that aren't runc's, of which nothing can be made."""
    packed = container.packed_options
    if packed is not None and packed.value and packed.type != api.OPTIONS_TYPE:
        raise InvalidArgument(
            f"container {container.id}: runtime options {packed.type_url} instead of {api.OPTIONS_TYPE}"
        )
    return container.options


def _fields(task: api.Task) -> Field:
    def field(path: Sequence[str]) -> str | None:
        match list(path):
            case ["id" | "container_id"]:
                return task.container_id
            case ["status"]:
                return task.status
            case ["pid"]:
                return str(task.pid)
        return None

    return field
