"""Execs: further processes of a running container, each with its own streams, exit and events.

    created ──► running ──► stopped ──► (deleted)

A row is all there is of one until it is started; the shim hears of it then. The container's lock is held throughout,
but many run at once: a start takes as long as the OCI runtime does, and no longer.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.message import now, pack, unpack
from shoal_bus.types import Mount, Stdio

from shoal_runtime.containers import Containers
from shoal_runtime.exits import KILLED, Exits, exit_of
from shoal_runtime.processes import Processes
from shoal_runtime.shims import ExitRecord
from shoal_runtime.spec import fit_to_host
from shoal_runtime.spec.capabilities import added_for_exec
from shoal_runtime.spec.check import check_process
from shoal_runtime.spec.users import find_user
from shoal_runtime.supervisor import Supervisor


class Execs:
    """The execs of every task."""

    def __init__(
        self, processes: Processes, database: Database, containers: Containers, supervisor: Supervisor, exits: Exits
    ) -> None:
        self._processes, self._db, self._containers = processes, database, containers
        self._supervisor, self._exits = supervisor, exits

    async def add(self, ctx: Context, request: api.ExecTask) -> api.Task:
        """Adds an exec to a task that isn't stopped, and starts it where that is asked for, too."""
        id, exec_id = request.container_id, request.exec_id
        task = self._processes.require(ctx.namespace, id)
        found = self._processes.find(ctx.namespace, id, exec_id)
        if found is None:
            if task["status"] not in ("created", "running"):
                raise FailedPrecondition(f"container {id}: its task is {task['status']}, an exec needs a running one")
            process = await self._process(ctx.namespace, request, task)
            with self._db.write() as tx:
                if _status(tx, ctx.namespace, id) not in ("created", "running"):
                    raise NotFound(f"container {id}: has no running task any more")
                tx.execute(
                    "INSERT INTO tasks (namespace, id, exec_id, request_id, status, process, stdio, auto_remove)"
                    " VALUES (?, ?, ?, ?, 'created', ?, ?, ?)",
                    (ctx.namespace, id, exec_id, ctx.id, pack(process), request.stdio.pack(), int(request.remove)),
                )
                if request.start:
                    ctx.begin(tx)
                else:
                    _tell_added(tx, ctx.namespace, id, exec_id)
                    added = api.Task(container_id=id, exec_id=exec_id, status="created", stdio=request.stdio)
                    ctx.answer(tx, added)
                    return added
        elif found["request_id"] != ctx.id:
            raise AlreadyExists(f"container {id}: has an exec {exec_id} already", hint="delete it first")
        try:
            return await self.start(ctx, id, exec_id, added=True)
        except Exception:
            self._drop(ctx.namespace, id, exec_id)
            raise

    async def _process(self, namespace: str, request: api.ExecTask, task: Any) -> dict[str, Any]:
        """The OCI process of an exec: the client's, or the container's own with what the client wants otherwise."""
        container = self._containers.require(namespace, request.container_id)
        if request.process is not None:
            process = copy.deepcopy(request.process)
        else:
            process = copy.deepcopy(container.spec.get("process") or {})
            process["args"] = list(request.args)
            process["cwd"] = request.cwd or process.get("cwd") or "/"
            process["env"] = _environment(process.get("env") or [], request.env)
            if request.user:
                rootfs = [Mount.model_validate(mount) for mount in unpack(task["rootfs"])]
                user = await asyncio.to_thread(find_user, rootfs, request.user)
                process["user"] = {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)}
            if request.capabilities:
                sets = process.setdefault("capabilities", {})
                more = added_for_exec(container.spec, request.capabilities)
                for name in ("bounding", "effective", "permitted"):
                    sets[name] = list(dict.fromkeys([*(sets.get(name) or []), *more]))
            process.pop("consoleSize", None)  # that of the first process's terminal
            if request.stdio.terminal and request.console_size is not None:
                process["consoleSize"] = request.console_size.model_dump()
        process["terminal"] = request.stdio.terminal
        check_process(process)
        fitted: dict[str, Any] = fit_to_host({"process": process})["process"]
        return fitted

    async def start(self, ctx: Context, id: str, exec_id: str, *, added: bool = False) -> api.Task:
        """Starts an exec, and answers `ctx` with it. `added` by the same request, it is told of once it has started."""
        row = self._processes.require(ctx.namespace, id, exec_id)
        if row["status"] != "created" or row["start_request"] not in ("", ctx.id):
            raise FailedPrecondition(f"container {id}: its exec {exec_id} has been started already")
        self._processes.set_start(ctx, id, exec_id)
        try:
            pid = await self._supervisor.exec(
                ctx.namespace, id, exec_id, process=unpack(row["process"]), stdio=Stdio.unpack(row["stdio"]),
                request_id=ctx.id,
            )  # fmt: skip
        except Exception:
            self._processes.unstart(ctx.namespace, id, exec_id)
            raise
        with self._db.write() as tx:
            started = tx.execute(
                "UPDATE tasks SET status = 'running', pid = ? WHERE namespace = ? AND id = ? AND exec_id = ?",
                (pid, ctx.namespace, id, exec_id),
            )
            if not started.rowcount:
                raise NotFound(f"container {id}: was removed meanwhile, and its exec {exec_id} with it")
            if added:
                _tell_added(tx, ctx.namespace, id, exec_id)
            event = api.TaskExecStarted(container_id=id, exec_id=exec_id, pid=pid)
            tx.emit(ctx.namespace, api.TASKS_EXEC_STARTED, event)
            exit = self._exits.settle(tx, ctx.namespace, id, exec_id)
            stdio = Stdio.unpack(row["stdio"])
            task = api.Task(container_id=id, exec_id=exec_id, pid=pid, status="running", stdio=stdio)
            ctx.answer(tx, task)
        if exit is not None:
            self._exits.announce(ctx.namespace, exit)
        return task

    async def delete(self, ctx: Context, id: str, exec_id: str, force: bool) -> api.Exit:
        """Removes an exec that has ended, or never began, and says how it ended."""
        return await self.remove(ctx.namespace, id, exec_id, force=force, answer=ctx)

    async def remove(
        self, namespace: str, id: str, exec_id: str, *, force: bool = False, answer: Context | None = None
    ) -> api.Exit:
        """The same, as the end of a request (`answer`) or of nobody's; the exec's lock is held."""
        row = self._processes.require(namespace, id, exec_id)
        if row["status"] == "running" and not force:
            raise FailedPrecondition(f"container {id}: its exec {exec_id} is running", hint="kill it first")
        record: ExitRecord | None = None
        if row["pid"]:
            try:
                record = await self._supervisor.delete_exec(namespace, id, exec_id, force)
            except NotFound:
                record = None  # its container's shim is gone, or a copy that died had it forget this one
        told: api.Exit | None = None
        with self._db.write() as tx:
            if row["pid"]:
                told = self._exits.record(tx, record or _killed(namespace, row))
            exit = exit_of(self._require(tx, namespace, id, exec_id))
            tx.execute("DELETE FROM tasks WHERE namespace = ? AND id = ? AND exec_id = ?", (namespace, id, exec_id))
            if answer is not None:
                answer.answer(tx, exit)
        if told is not None:
            self._exits.announce(namespace, told)
        return exit

    def running(self, namespace: str, id: str) -> list[tuple[str, int]]:
        """The id and the pid of every exec of a container whose end nobody has told of."""
        rows = self._db.read(
            "SELECT exec_id, pid FROM tasks WHERE namespace = ? AND id = ? AND exec_id != '' AND status = 'running'",
            (namespace, id),
        )
        return [(row["exec_id"], row["pid"]) for row in rows]

    def end_all(self, tx: Transaction, namespace: str, id: str) -> list[api.Exit]:
        """Forgets every exec of a task that is removed; those nobody heard the end of were killed with it."""
        lost = []
        for row in tx.execute(
            "SELECT * FROM tasks WHERE namespace = ? AND id = ? AND exec_id != '' AND pid", (namespace, id)
        ).fetchall():
            exit = self._exits.record(tx, _killed(namespace, row))
            if exit is not None:
                lost.append(exit)
        tx.execute("DELETE FROM tasks WHERE namespace = ? AND id = ? AND exec_id != ''", (namespace, id))
        return lost

    @staticmethod
    def _require(tx: Transaction, namespace: str, id: str, exec_id: str) -> Any:
        row = tx.execute(
            "SELECT * FROM tasks WHERE namespace = ? AND id = ? AND exec_id = ?", (namespace, id, exec_id)
        ).fetchone()
        if row is None:
            raise NotFound(f"container {id}: was removed meanwhile, and its exec {exec_id} with it")
        return row

    def _drop(self, namespace: str, id: str, exec_id: str) -> None:
        with self._db.write() as tx:
            tx.execute(
                "DELETE FROM tasks WHERE namespace = ? AND id = ? AND exec_id = ? AND status = 'created'",
                (namespace, id, exec_id),
            )


def _tell_added(tx: Transaction, namespace: str, id: str, exec_id: str) -> None:
    tx.emit(namespace, api.TASKS_EXEC_ADDED, api.TaskExecAdded(container_id=id, exec_id=exec_id))


def _killed(namespace: str, row: Any) -> ExitRecord:
    return ExitRecord(namespace, row["id"], row["pid"], KILLED, now(), row["exec_id"])


def _status(tx: Transaction, namespace: str, id: str) -> str:
    row = tx.execute(
        "SELECT status FROM tasks WHERE namespace = ? AND id = ? AND exec_id = ''", (namespace, id)
    ).fetchone()
    return row["status"] if row is not None else ""


def _environment(own: list[str], more: list[str]) -> list[str]:
    """The container's variables and then the exec's; of two with one name the later wins, a name alone removes it."""
    variables = {one.partition("=")[0]: one for one in own}
    for one in more:
        name, equals, _ = one.partition("=")
        if not name or "\0" in one:
            raise InvalidArgument(f"env {one!r}: must be NAME=VALUE")
        variables.pop(name, None)
        if equals:
            variables[name] = one
    return list(variables.values())
