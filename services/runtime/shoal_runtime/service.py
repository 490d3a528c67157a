"""Subjects to domain: which verb is answered by what, and what it locks."""

from __future__ import annotations

import argparse
import asyncio

from shoal_bus.api import runtime as api
from shoal_bus.process import Process

from shoal_runtime import cgroups, shim_log
from shoal_runtime.bundles import Bundles
from shoal_runtime.containers import Containers
from shoal_runtime.controls import Controls
from shoal_runtime.exits import ExitHeard, Exits
from shoal_runtime.gc import Collection
from shoal_runtime.metrics import Metrics
from shoal_runtime.mount_manager import MountManager
from shoal_runtime.mount_manager import lock_of as mount_lock_of
from shoal_runtime.mount_manager.collecting import MountCollection
from shoal_runtime.mount_manager.places import Places
from shoal_runtime.published import LOCK as PUBLISHED_LOCK
from shoal_runtime.published import Published
from shoal_runtime.reconcile import Reconciliation
from shoal_runtime.removal import Removal, lock_of, lock_of_process
from shoal_runtime.restart.decision import INTERVAL_SECONDS
from shoal_runtime.restart.monitor import Monitor
from shoal_runtime.restart.rows import Rows
from shoal_runtime.restart.start import Starts
from shoal_runtime.run import Runs
from shoal_runtime.runtime_info import RuntimeInfos
from shoal_runtime.sandboxes import controller as sandboxes
from shoal_runtime.sandboxes import store as stored
from shoal_runtime.sandboxes.controller import SandboxController, SandboxStopped
from shoal_runtime.sandboxes.store import SandboxStore
from shoal_runtime.schema import MIGRATIONS
from shoal_runtime.supervisor import Supervisor
from shoal_runtime.tasks import Tasks

_EXIT = "exit"
_SANDBOX = "sandbox"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The service's own flags."""
    parser.add_argument(
        "--restart-interval", type=_seconds, default=INTERVAL_SECONDS,
        help="seconds between looks at every container's restart policy, as containerd's restart monitor has it;"
        " 0: policies are left alone",
    )  # fmt: skip


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more seconds")
    return seconds


def _lock_of_process(request: api.ProcessRequest | api.ExecTask) -> str:
    return lock_of_process(request.container_id, request.exec_id)


async def setup(process: Process) -> None:
    """Registers every verb, finds the shims that run, and mends what the last copy left."""
    database = process.database(MIGRATIONS)
    service = process.service("containers, tasks, and the shims that supervise them")
    telling: set[asyncio.Task[None]] = set()

    def tell(heard: ExitHeard) -> None:
        task = asyncio.ensure_future(service.broadcast(_EXIT, heard.pack()))
        telling.add(task)
        task.add_done_callback(telling.discard)

    exits = Exits(database, tell)
    supervisor = Supervisor(process.state, process.locks, exits.heard, exits.out_of_memory)
    process.stack.push_async_callback(supervisor.close)
    process.stack.enter_context(shim_log.heard(process.state))
    bundles = Bundles(process.state)
    containers = Containers(database, process.node.runtime)
    places = Places(process.state / "mounts", (process.node.root, process.node.state))
    mounts = MountManager(database, process.locks, places)
    tasks = Tasks(database, containers, supervisor, exits, bundles, mounts)
    controls = Controls(database, containers, tasks, supervisor)
    removal = Removal(database, process.locks, containers, tasks, service.client.with_namespace)
    runs = Runs(database, process.locks, containers, tasks, removal, process.node.runtime)
    exits.on_recorded(lambda *_: removal.wake())
    rows, interval = Rows(database), process.args.restart_interval or INTERVAL_SECONDS
    monitor = Monitor(rows, service.client.with_namespace, interval)
    starts = Starts(database, rows, containers, tasks, removal, monitor.look_everywhere, interval)
    exits.on_recorded(lambda namespace, exit: monitor.look_at(namespace, exit.container_id))
    containers.on_updated(monitor.look_at)
    process.stack.callback(cgroups.remove_empty, database, bundles)
    process.stack.push_async_callback(removal.stop)
    process.stack.push_async_callback(monitor.stop)

    service.handle(api.CONTAINER_CREATE, containers.create, lock=lambda r: lock_of(r.id), begins_itself=True)
    service.handle(api.CONTAINER_GET, containers.get)
    service.stream(api.CONTAINER_LIST, containers.list)
    service.handle(api.CONTAINER_UPDATE, containers.update, lock=lambda r: lock_of(r.id), begins_itself=True)
    service.handle(api.CONTAINER_DELETE, containers.delete, lock=lambda r: lock_of(r.id), begins_itself=True)
    service.handle(api.CONTAINER_REMOVE, removal.remove, lock=lambda r: lock_of(r.id))
    service.handle(api.CONTAINER_START, starts.start, lock=lambda r: lock_of(r.id))
    service.handle(api.CONTAINER_RESTART, starts.restart, lock=lambda r: lock_of(r.id))
    service.handle(api.NODE_HOLD_RESTARTS, starts.hold, lock=lambda _: "restarts")
    service.handle(api.TASK_CREATE, tasks.create, lock=lambda r: lock_of(r.container_id), begins_itself=True)
    service.handle(api.TASK_EXEC, tasks.execs.add, lock=_lock_of_process, begins_itself=True)
    service.handle(api.TASK_START, tasks.start, lock=_lock_of_process, begins_itself=True)
    service.handle(api.TASK_WAIT, tasks.wait)
    service.handle(api.TASK_DELETE, tasks.delete, lock=_lock_of_process)
    service.handle(api.TASK_GET, tasks.get)
    service.stream(api.TASK_LIST, tasks.list)
    service.handle(api.TASK_KILL, controls.kill, lock=_lock_of_process, begins_itself=True)
    service.handle(api.TASK_PAUSE, controls.pause, lock=lambda r: lock_of(r.container_id))
    service.handle(api.TASK_RESUME, controls.resume, lock=lambda r: lock_of(r.container_id))
    service.handle(api.TASK_UPDATE, controls.update, lock=lambda r: lock_of(r.container_id))
    service.handle(api.TASK_CHECKPOINT, controls.checkpoint, lock=lambda r: lock_of(r.container_id))
    service.handle(api.TASK_PIDS, controls.pids)
    service.handle(api.TASK_RESIZE, controls.resize)
    service.handle(api.TASK_CLOSE_IO, controls.close_io)
    metrics = Metrics(database)
    service.stream(api.TASK_METRICS, metrics.of_tasks)
    service.stream(api.NODE_METRICS, metrics.of_node)
    service.operate(api.TASK_RUN, runs.run, undo=runs.undo, lock=lambda r: lock_of(r.id))
    published = Published(database)
    service.handle(api.EVENT_PUBLISH, published.publish, lock=lambda _: PUBLISHED_LOCK, begins_itself=True)
    service.handle(api.MOUNT_ACTIVATE, mounts.activate, lock=lambda r: mount_lock_of(r.name), begins_itself=True)
    service.handle(api.MOUNT_DEACTIVATE, mounts.deactivate, lock=lambda r: mount_lock_of(r.name), begins_itself=True)
    service.handle(api.MOUNT_INFO, mounts.info)
    service.stream(api.MOUNT_LIST, mounts.list)
    service.handle(api.MOUNT_UPDATE, mounts.update, lock=lambda r: mount_lock_of(r.name), begins_itself=True)
    service.handle(api.RUNTIME_INFO, RuntimeInfos(process.node.runtime).info)
    store = SandboxStore(database)
    service.handle(api.SANDBOX_CREATE, store.create, lock=lambda r: stored.lock_of(r.id), begins_itself=True)
    service.handle(api.SANDBOX_GET, store.get)
    service.stream(api.SANDBOX_LIST, store.list)
    service.handle(api.SANDBOX_UPDATE, store.update, lock=lambda r: stored.lock_of(r.id), begins_itself=True)
    service.handle(api.SANDBOX_DELETE, store.delete, lock=lambda r: stored.lock_of(r.id), begins_itself=True)
    controller = SandboxController(
        database, containers, exits, lambda stopped: service.broadcast_soon(_SANDBOX, stopped.pack())
    )
    service.handle(api.SANDBOX_RUN, controller.run, lock=lambda r: sandboxes.lock_of(r.id), begins_itself=True)
    service.handle(api.SANDBOX_START, controller.start, lock=lambda r: sandboxes.lock_of(r.id), begins_itself=True)
    service.handle(api.SANDBOX_STATUS, controller.status)
    service.operate(
        api.SANDBOX_STOP, controller.stop, undo=controller.undo_stop, lock=lambda r: sandboxes.lock_of(r.id)
    )
    service.handle(api.SANDBOX_WAIT, controller.wait)
    service.handle(
        api.SANDBOX_SHUTDOWN, controller.shutdown, lock=lambda r: sandboxes.lock_of(r.id), begins_itself=True
    )
    service.on_broadcast(_SANDBOX, lambda data: controller.wake(SandboxStopped.unpack(data)))
    collection = Collection(database)
    service.handle(api.GC_OPEN, collection.open, lock=lambda _: "collection", begins_itself=True)
    service.stream(api.GC_HOLDERS, collection.holders)
    collecting = MountCollection(database, mounts)
    service.stream(api.GC_MOUNTS, collecting.mounts)
    service.handle(api.GC_SWEEP, collecting.sweep, lock=lambda _: "collection")
    service.handle(api.GC_CLOSE, collection.close, lock=lambda _: "collection", begins_itself=True)
    service.on_broadcast(_EXIT, lambda data: exits.wake(ExitHeard.unpack(data)))

    await mounts.reconcile()
    found = await supervisor.start()
    await Reconciliation(database, process.locks, supervisor, tasks, exits, bundles).run(found)
    service.background(removal.sweep_for_ever(), "removal")
    if process.args.restart_interval:
        service.background(monitor.watch_for_ever(), "restarts")
