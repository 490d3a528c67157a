"""A whole run in one message: image, snapshot, network, container, task, start. All of it happens, or none.

Its row is written before the first effect and says everything that may be there. A copy that dies in the middle leaves
the request begun: the next copy carries on from what it finds, each step knowing its own work again, or undoes it when
nobody asks any more.
"""

from __future__ import annotations

import asyncio

from shoal_bus import restart
from shoal_bus.api import content
from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import AlreadyExists, NotFound, ShoalError
from shoal_bus.locks import Locks
from shoal_bus.message import now
from shoal_bus.types import Mount

from shoal_runtime.containers import Containers
from shoal_runtime.plan import Made, RunPlan, check_network, make_plan
from shoal_runtime.removal import Removal, lock_key
from shoal_runtime.runtimes import require_runtime
from shoal_runtime.spec import check_run_spec, generate_spec
from shoal_runtime.tasks import Tasks


class Runs:
    """Runs of containers from images."""

    def __init__(
        self, database: Database, locks: Locks, containers: Containers, tasks: Tasks, removal: Removal, runtime: str
    ) -> None:
        self._db, self._locks, self._containers = database, locks, containers
        self._tasks, self._removal, self._runtime = tasks, removal, runtime

    async def run(self, ctx: Context, request: api.RunTask) -> api.Task:
        """The started task. Whatever fails, nothing is left behind; the container's lock is held."""
        runtime = request.runtime or self._runtime
        check_network(request.network)
        require_runtime(runtime)
        if request.spec is not None:
            check_run_spec(request.spec, terminal=request.stdio.terminal)
        plan = self._removal.plan_of(ctx.namespace, request.id)
        if plan is None or plan.request_id != ctx.id:
            self._check_free(ctx.namespace, request.id, plan)
            ctx.progress(api.RunProgress(step="image"))
            plan = await make_plan(ctx.client, ctx.id, request, runtime)
            self._begin(ctx.namespace, request, plan)
        try:
            return await self._carry_out(ctx, request, plan)
        except asyncio.CancelledError:
            # A copy that stops leaves it to the next; a caller who has gone wants none of it.
            if not ctx.draining.is_set() and ctx.answered is None:
                await asyncio.shield(self._undo(ctx, request))
            raise
        except Exception:
            if ctx.answered is None:
                await self._undo(ctx, request)
            raise

    async def undo(self, ctx: Context, request: api.RunTask) -> None:
        """Undoes what a dead copy began and nobody wants any more."""
        async with self._locks.hold(lock_key(ctx.namespace, request.id)):
            plan = self._removal.plan_of(ctx.namespace, request.id)
            if plan is not None and plan.request_id == ctx.id:
                await self._removal.carry_out(ctx.namespace, request.id)

    def _check_free(self, namespace: str, id: str, plan: RunPlan | None) -> None:
        if plan is not None or self._containers.find(namespace, id) is not None:
            raise AlreadyExists(f"container {id}: already exists", hint="remove it, or use another name")

    def _begin(self, namespace: str, request: api.RunTask, plan: RunPlan) -> None:
        with self._db.write() as tx:
            tx.execute(
                "INSERT INTO runs VALUES (?, ?, ?, 'making', ?, ?)",
                (namespace, request.id, plan.request_id, plan.pack(), int(request.remove)),
            )

    async def _carry_out(self, ctx: Context, request: api.RunTask, plan: RunPlan) -> api.Task:
        ctx.progress(api.RunProgress(step="snapshot"))
        try:
            mounts = await Made(ctx.client, plan).snapshot()
        except NotFound:
            if plan.unpacked:
                raise
            plan = await self._have_unpacked(ctx, plan)
            mounts = await Made(ctx.client, plan).snapshot()
        made = Made(ctx.client, plan)
        netns = ""
        if plan.bridged:
            ctx.progress(api.RunProgress(step="network"))
            netns = (await made.network()).path
            await made.attach()
        ctx.progress(api.RunProgress(step="container"))
        await self._make_container(ctx, request, plan, mounts, netns)
        ctx.progress(api.RunProgress(step="task"))
        await self._tasks.begin(ctx, request.id, mounts, request.stdio)
        ctx.progress(api.RunProgress(step="start"))
        return await self._tasks.begin_to_run(ctx, request.id)

    async def _have_unpacked(self, ctx: Context, plan: RunPlan) -> RunPlan:
        """Has an image unpacked that was stored without that, or whose layers a power cut has taken."""
        ctx.log.info("run.unpacking", image=plan.image, snapshotter=plan.snapshotter)
        plan = plan.model_copy(update={"unpacked": True})
        with self._db.write() as tx:
            tx.execute("UPDATE runs SET plan = ? WHERE namespace = ? AND id = ?", (plan.pack(), ctx.namespace, plan.id))
        await ctx.operate(
            content.IMAGE_UNPACK, content.UnpackImage(name=plan.image, snapshotter=plan.snapshotter), step="unpack"
        )
        return plan

    async def _make_container(
        self, ctx: Context, request: api.RunTask, plan: RunPlan, mounts: list[Mount], netns: str
    ) -> None:
        if self._containers.find(ctx.namespace, request.id) is not None:
            return  # this run's own, made before it was resumed: the row of a run keeps everybody else out
        spec = request.spec
        if spec is None:
            spec = await asyncio.to_thread(
                generate_spec, ctx.namespace, request.id, plan.config, mounts, request, netns=netns,
                terminal=request.stdio.terminal, host_network=request.network.mode == "host",
                resolv_conf=plan.bridged,
            )  # fmt: skip
        at = now()
        record = api.Container(
            id=request.id, image=plan.image, labels={**request.labels, **restart.labels_of(request.restart)},
            runtime=plan.runtime, snapshotter=plan.snapshotter, snapshot_key=request.id,
            network=request.id if plan.bridged else "", spec=spec, created_at=at, updated_at=at,
        )  # fmt: skip
        with self._db.write() as tx:
            self._containers.insert(tx, ctx.namespace, record, ctx.id)
            tx.execute("UPDATE runs SET state = 'made' WHERE namespace = ? AND id = ?", (ctx.namespace, request.id))

    async def _undo(self, ctx: Context, request: api.RunTask) -> None:
        try:
            await self._removal.carry_out(ctx.namespace, request.id)
        except ShoalError as error:
            # The run's own error is what its caller should hear; the sweep goes on with this.
            ctx.log.warning("run.undone_later", container=request.id, error=str(error))
