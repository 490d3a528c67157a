"""What is done to a task while it is there: signals, pause, limits, checkpoints, its terminal, and what runs in it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.events import Topic
from shoal_bus.message import Empty, Message
from shoal_bus.types import AnyMessage

from shoal_runtime import checkpoints, pids
from shoal_runtime.containers import Containers
from shoal_runtime.restart.rows import Rows
from shoal_runtime.spec.check import check_resources
from shoal_runtime.supervisor import Supervisor
from shoal_runtime.tasks import Tasks


class Controls:
    """The verbs that leave a task where it is."""

    def __init__(self, database: Database, containers: Containers, tasks: Tasks, supervisor: Supervisor) -> None:
        self._db, self._containers, self._tasks, self._supervisor = database, containers, tasks, supervisor
        self._processes = tasks.processes
        self._restarts = Rows(database)

    def _living(self, ctx: Context, id: str, exec_id: str = "") -> Any:
        """The row of a process that has been created and hasn't ended."""
        row = self._processes.require(ctx.namespace, id, exec_id)
        what = f"container {id}" + (f", exec {exec_id}" if exec_id else "")
        if row["status"] == "creating":
            raise FailedPrecondition(f"{what}: is just being created")
        if row["status"] == "stopped":
            raise NotFound(f"{what}: the process has already finished")
        return row

    async def kill(self, ctx: Context, request: api.KillTask) -> Empty:
        """Sends a signal to a process, or to all of the container."""
        id, exec_id = request.container_id, request.exec_id
        # A copy that died may have sent it, and that may have been the process's end: its shim knows.
        row = self._processes.require(ctx.namespace, id, exec_id) if ctx.resumed else self._living(ctx, id, exec_id)
        if not row["pid"]:
            raise FailedPrecondition(f"container {id}: the process hasn't been started")
        if request.all and exec_id:
            raise InvalidArgument("all: signals every process of the container, exec_id one: give either")
        with self._db.write() as tx:
            ctx.begin(tx)
            if not exec_id:
                self._restarts.killed(tx, ctx.namespace, id)
        await self._supervisor.kill(ctx.namespace, id, request.signal, request.all, exec_id, request_id=ctx.id)
        return Empty()

    async def pause(self, ctx: Context, request: api.TaskRequest) -> Empty:
        """Freezes a running task."""
        self._require_status(ctx, request.container_id, "running", "paused")
        await self._supervisor.pause(ctx.namespace, request.container_id)
        event = api.TaskPaused(container_id=request.container_id)
        self._turn(ctx, request.container_id, "running", "paused", api.TASKS_PAUSED, event)
        return Empty()

    async def resume(self, ctx: Context, request: api.TaskRequest) -> Empty:
        """Thaws a paused task."""
        self._require_status(ctx, request.container_id, "paused", "running")
        await self._supervisor.resume(ctx.namespace, request.container_id)
        event = api.TaskResumed(container_id=request.container_id)
        self._turn(ctx, request.container_id, "paused", "running", api.TASKS_RESUMED, event)
        return Empty()

    def _require_status(self, ctx: Context, id: str, wanted: str, already: str) -> None:
        row = self._living(ctx, id)
        if row["status"] != wanted and not (ctx.resumed and row["status"] == already):
            raise FailedPrecondition(f"container {id}: its task is {row['status']}, not {wanted}")

    def _turn(self, ctx: Context, id: str, before: str, after: str, topic: Topic[Any], event: Message) -> None:
        with self._db.write() as tx:
            turned = tx.execute(
                "UPDATE tasks SET status = ? WHERE namespace = ? AND id = ? AND exec_id = '' AND status = ?",
                (after, ctx.namespace, id, before),
            )
            if turned.rowcount:  # it hasn't ended meanwhile
                tx.emit(ctx.namespace, topic, event)
            ctx.answer(tx, Empty())

    async def update(self, ctx: Context, request: api.UpdateTask) -> Empty:
        """Changes the limits of a task."""
        self._living(ctx, request.container_id)
        check_resources(request.resources)
        await self._supervisor.update(ctx.namespace, request.container_id, request.resources)
        with self._db.write() as tx:
            if not request.once:
                self._containers.limit(tx, ctx.namespace, request.container_id, request.resources)
            ctx.answer(tx, Empty())
        return Empty()

    async def checkpoint(self, ctx: Context, request: api.CheckpointTask) -> api.Checkpoint:
        """Writes a task to the content store, or to a directory, which is made; what failed leaves nothing."""
        id = request.container_id
        row = self._living(ctx, id)
        if row["status"] == "created":
            raise FailedPrecondition(f"container {id}: its task hasn't been started")
        if request.path:
            reply, path = api.Checkpoint(), request.path
            await self._checkpoint_to(ctx, request, Path(path))
        else:
            spec = self._containers.require(ctx.namespace, id, packed=True).packed_spec or AnyMessage()
            async with checkpoints.written_to(Path(row["bundle"])) as directory:
                await self._supervisor.checkpoint(ctx.namespace, id, str(directory), _flags(request))
                client = ctx.client.with_lease(ctx.lease) if ctx.lease else ctx.client
                reply = api.Checkpoint(descriptors=await checkpoints.store(client, directory, spec))
            path = reply.descriptors[0].digest
        with self._db.write() as tx:
            event = api.TaskCheckpointed(container_id=id, checkpoint=path)
            tx.emit(ctx.namespace, api.TASKS_CHECKPOINTED, event)
            ctx.answer(tx, reply)
        return reply

    async def _checkpoint_to(self, ctx: Context, request: api.CheckpointTask, path: Path) -> None:
        if not path.is_absolute():
            raise InvalidArgument(f"path {request.path!r}: must be absolute")
        try:
            made = await asyncio.to_thread(_make_directory, path)
        except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
            raise FailedPrecondition(f"checkpoint {path}: no directory can be there: {error.strerror}") from None
        try:
            await self._supervisor.checkpoint(ctx.namespace, request.container_id, str(path), _flags(request))
        except Exception:
            if made:
                await asyncio.to_thread(shutil.rmtree, path, True)
            raise

    async def resize(self, ctx: Context, request: api.ResizeTask) -> Empty:
        """Sets the size of a process's terminal."""
        self._living(ctx, request.container_id, request.exec_id)
        await self._supervisor.resize(
            ctx.namespace, request.container_id, request.width, request.height, request.exec_id
        )
        return Empty()

    async def close_io(self, ctx: Context, request: api.ProcessRequest) -> Empty:
        """Ends a process's standard input."""
        self._processes.require(ctx.namespace, request.container_id, request.exec_id)
        await self._supervisor.close_stdin(ctx.namespace, request.container_id, request.exec_id)
        return Empty()

    async def pids(self, ctx: Context, request: api.TaskRequest) -> api.Pids:
        """Every process of a task."""
        row = self._living(ctx, request.container_id)
        names = {pid: exec_id for exec_id, pid in self._tasks.execs.running(ctx.namespace, request.container_id)}
        found = await asyncio.to_thread(pids.of_container, row["pid"])
        return api.Pids(processes=[api.ProcessInfo(pid=pid, exec_id=names.get(pid, "")) for pid in found])


def _make_directory(path: Path) -> bool:
    """Whether it had to be made."""
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return made


def _flags(request: api.CheckpointTask) -> list[str]:
    """The request in the words of the OCI runtime's command line."""
    chosen = {
        "--leave-running": not request.exit,
        "--tcp-established": request.open_tcp,
        "--ext-unix-sk": request.external_unix_sockets,
        "--shell-job": request.terminal,
        "--file-locks": request.file_locks,
    }
    flags = [flag for flag, wanted in chosen.items() if wanted]
    if request.work_path:
        flags += ["--work-path", request.work_path]
    for namespace in request.empty_namespaces:
        flags += ["--empty-ns", namespace]
    return flags
