"""How a container is started that doesn't run: its old task deleted, a new one made of its snapshot, and that started.

Each start is a request to the service itself, so it is done once by its id, under the container's lock, and finished by
whoever has that lock next when its copy dies. What it makes the new task of is written down in one transaction with the
count, before the old task goes.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal_bus import restart
from shoal_bus.api import runtime as api
from shoal_bus.api import snapshot
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import Aborted, Code, FailedPrecondition, ShoalError
from shoal_bus.message import Empty, unpack
from shoal_bus.types import Mount, Stdio

from shoal_runtime.containers import Containers
from shoal_runtime.plan import Made
from shoal_runtime.removal import Removal
from shoal_runtime.restart.decision import INTERVAL_SECONDS, is_wanted_again, next_pause
from shoal_runtime.restart.rows import Plan, Rows
from shoal_runtime.tasks import Tasks

_PATIENCE_SECONDS = 5.0
_ELSEWHERE = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED})
"""Another service isn't there: that says nothing about the container, and doesn't count."""


class Starts:
    """Starts of containers that have been made, and may have run, before."""

    def __init__(
        self,
        database: Database,
        rows: Rows,
        containers: Containers,
        tasks: Tasks,
        removal: Removal,
        on_held: Callable[[], None],
        interval: float = INTERVAL_SECONDS,
    ) -> None:
        """`on_held` is called when restarts are held, or no longer."""
        self._db, self._rows, self._on_held, self._interval = database, rows, on_held, interval
        self._containers, self._tasks, self._removal = containers, tasks, removal
        self._processes = tasks.processes

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def start(self, ctx: Context, request: api.ContainerRequest) -> api.Task:
        """As a client asks for it: it is to run from now on, whatever was said before."""
        plan = self._rows.plan(ctx.namespace, request.id, ctx.id)
        if plan is None:
            container = self._containers.require(ctx.namespace, request.id)
            row = self._processes.find(ctx.namespace, request.id)
            if row is not None and row["status"] != "stopped":
                raise FailedPrecondition(f"container {request.id}: has a task, which is {row['status']}")
            plan = await self._plan(ctx, container)
            labels = {}
            if restart.STATUS in container.labels or restart.POLICY in container.labels:
                labels = {restart.STATUS: restart.RUNNING, restart.EXPLICITLY_STOPPED: "false"}
            self._begin(ctx, request.id, plan, 0.0, labels)
        return await self._carry_out(ctx, request.id, plan)

    async def restart(self, ctx: Context, request: api.RestartContainer) -> api.Task:
        """As its policy has it. ABORTED where the policy doesn't, or somebody else was faster."""
        plan = self._rows.plan(ctx.namespace, request.id, ctx.id)
        if plan is None:
            look = self._rows.look(ctx.namespace, request.id)
            if ctx.resumed or look is None or look.latest != request.after or not is_wanted_again(look):
                raise Aborted(f"container {request.id}: isn't to be started again, or has been")
            container = self._containers.require(ctx.namespace, request.id)
            pause = next_pause(look, self._interval)
            counted = {restart.COUNT: str(restart.count_of(container.labels) + 1)}
            try:
                plan = await self._plan(ctx, container)
            except ShoalError as error:
                self._begin(ctx, request.id, None, pause, {} if error.code in _ELSEWHERE else counted)
                raise
            self._begin(ctx, request.id, plan, pause, counted)
        return await self._carry_out(ctx, request.id, plan)

    async def hold(self, ctx: Context, request: api.HoldRestarts) -> Empty:
        """Has the policies of all containers wait."""
        with self._db.write() as tx:
            self._rows.hold(tx, request.seconds)
            ctx.answer(tx, Empty())
        self._on_held()
        return Empty()

    # ------------------------------------------------------------------------------------------------------- its steps

    async def _plan(self, ctx: Context, container: api.Container) -> Plan:
        """Asks other services for what it needs of them. Nothing of the container has changed yet."""
        earlier = self._earlier(ctx.namespace, container.id)
        rootfs = earlier.rootfs
        if container.snapshot_key:
            verb = snapshot.SNAPSHOT_MOUNTS.on(container.snapshotter or snapshot.DEFAULT)
            request = snapshot.SnapshotRequest(key=container.snapshot_key)
            rootfs = (await ctx.client.call(verb, request, patience=_PATIENCE_SECONDS)).mounts
        run = self._removal.plan_of(ctx.namespace, container.id)
        if run is not None:
            await Made(ctx.client, run.model_copy(update={"request_id": ctx.id})).network_again(_PATIENCE_SECONDS)
        terminal = bool((container.spec.get("process") or {}).get("terminal"))
        stdio = streams(restart.log_uri_of(container.labels), earlier.stdio, terminal=terminal)
        return Plan(rootfs=rootfs, stdio=stdio)

    def _earlier(self, namespace: str, id: str) -> Plan:
        """What its last task was made of, as far as that is known."""
        row = self._processes.find(namespace, id)
        if row is None:
            return self._rows.earlier_plan(namespace, id) or Plan()
        rootfs = [Mount.of(mount) for mount in unpack(row["rootfs"])]
        return Plan(rootfs=rootfs, stdio=Stdio.unpack(row["stdio"]))

    def _begin(self, ctx: Context, id: str, plan: Plan | None, pause: float, labels: dict[str, str]) -> None:
        """Writes it down; without a plan it has failed before it began."""
        with self._db.write() as tx:
            if labels:
                self._containers.relabel(tx, ctx.namespace, id, labels)
            self._rows.begin(tx, ctx.namespace, id, ctx.id, plan or self._earlier(ctx.namespace, id), pause)
            if plan is None:
                self._rows.fail(tx, ctx.namespace, id)

    async def _carry_out(self, ctx: Context, id: str, plan: Plan) -> api.Task:
        try:
            row = self._processes.find(ctx.namespace, id)
            if row is not None and row["request_id"] != ctx.id:
                await self._tasks.end(ctx.namespace, id)
            await self._tasks.begin(ctx, id, plan.rootfs, plan.stdio)
            task = await self._tasks.begin_to_run(ctx, id)
        except Exception:
            await self._undo(ctx, id)
            raise
        ctx.log.info("container.started", container=id, pid=task.pid)
        return task

    async def _undo(self, ctx: Context, id: str) -> None:
        """A task that couldn't be started is in the way of the next one."""
        row = self._processes.find(ctx.namespace, id)
        if row is not None and row["request_id"] == ctx.id and row["status"] == "created":
            await self._tasks.end(ctx.namespace, id)
        with self._db.write() as tx:
            self._rows.fail(tx, ctx.namespace, id)


def streams(log_uri: str, earlier: Stdio, *, terminal: bool) -> Stdio:
    """Where a restarted process writes: to its log URI, or else to the files and log programs of the process before.

    FIFOs belong to a client that has seen its process end: nobody reads them, and they would fill.
    """
    if log_uri:
        return Stdio(stdout=log_uri, stderr="" if terminal else log_uri, terminal=terminal)
    lasting = {name: where for name in ("stdout", "stderr") if "://" in (where := getattr(earlier, name))}
    return Stdio(**lasting, terminal=terminal)
