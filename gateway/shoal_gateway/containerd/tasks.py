"""containerd.services.tasks.v1.Tasks: the runtime service has them, and their shims."""

from __future__ import annotations

from typing import Protocol

from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from shoal_bus.api import runtime
from shoal_bus.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from shoal_bus.identifiers import check_identifier
from shoal_bus.types import Stdio

from shoal_gateway import task_metrics, typeurls
from shoal_gateway.call import Call
from shoal_gateway.convert import descriptor_told, digest_of, mounts_of, quote, sought, timestamp
from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import CheckpointOptions, Options, ProcessDetails
from shoal_gateway.proto.containerd.services.tasks.v1 import tasks_pb2 as pb
from shoal_gateway.proto.containerd.types.metrics_pb2 import Metric
from shoal_gateway.proto.containerd.v1.types import task_pb2
from shoal_gateway.rpc import Servicer

CHECKPOINT = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
"""The media type of a checkpoint that a task can be restored from."""
NEVER = Timestamp(seconds=-62_135_596_800)
"""Go's zero time, the first moment of the year 1: when what hasn't ended has ended."""
_STATUS = {
    "created": task_pb2.CREATED, "running": task_pb2.RUNNING, "paused": task_pb2.PAUSED, "stopped": task_pb2.STOPPED,
}  # fmt: skip


class Tasks(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Tasks"]

    async def create(self, call: Call, request: pb.CreateTaskRequest) -> pb.CreateTaskResponse:
        """A client that goes away meanwhile leaves no task, as with containerd; whatever else it asks for is done."""
        if request.task_api_address:
            raise Unimplemented("task_api_address: shoal's tasks are those of its own shims")
        options, checkpoint = None, request.checkpoint.annotations.get("RestoreFromPath", "")
        if request.HasField("options"):
            packed = typeurls.message_of(request.options, Options, "task create options")
            options = typeurls.runc_options(packed)
            checkpoint = checkpoint or packed.criu_image_path
        blob = None
        if request.HasField("checkpoint") and not checkpoint:
            if request.checkpoint.media_type != CHECKPOINT:
                raise InvalidArgument(f"unsupported checkpoint type {request.checkpoint.media_type!r}")
            blob = digest_of(request.checkpoint.digest)
        wanted = runtime.CreateTask(
            container_id=_named(call, request.container_id),
            rootfs=mounts_of(request.rootfs),
            stdio=Stdio(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal),
            runtime=request.runtime_path,
            options=options,
            checkpoint=checkpoint,
            checkpoint_blob=blob,
        )

        async def undo(made: runtime.Task) -> None:
            await call.undo(runtime.TASK_DELETE, runtime.DeleteTask(container_id=made.container_id))

        task = await call.make(runtime.TASK_CREATE, wanted, undo)
        return pb.CreateTaskResponse(container_id=task.container_id, pid=task.pid)

    async def start(self, call: Call, request: pb.StartRequest) -> pb.StartResponse:
        return pb.StartResponse(pid=(await call.ask(runtime.TASK_START, _process(call, request))).pid)

    async def delete(self, call: Call, request: pb.DeleteTaskRequest) -> pb.DeleteResponse:
        exit = await call.ask(runtime.TASK_DELETE, runtime.DeleteTask(container_id=_named(call, request.container_id)))
        return _deleted(exit)

    async def delete_process(self, call: Call, request: pb.DeleteProcessRequest) -> pb.DeleteResponse:
        wanted = runtime.DeleteTask(container_id=_named(call, request.container_id), exec_id=_sought(request.exec_id))
        return _deleted(await call.ask(runtime.TASK_DELETE, wanted))

    async def get(self, call: Call, request: pb.GetRequest) -> pb.GetResponse:
        return pb.GetResponse(process=_told(await _require(call, _process(call, request))))

    async def list(self, call: Call, request: pb.ListTasksRequest) -> pb.ListTasksResponse:
        """Every task, whatever the filter: containerd doesn't look at it either."""
        tasks = call.items(runtime.TASK_LIST, runtime.ListTasks())
        return pb.ListTasksResponse(tasks=[_told(one) async for one in tasks if one.status in _STATUS])

    async def kill(self, call: Call, request: pb.KillRequest) -> Empty:
        id, exec_id = _of(call, request)
        if not request.signal:  # as kill(2) has it, that looks whether it is there
            task = await _require(call, runtime.ProcessRequest(container_id=id, exec_id=exec_id))
            if task.status == "stopped":
                raise NotFound("process already finished: not found")
            return Empty()
        every = request.all and not exec_id
        wanted = runtime.KillTask(container_id=id, exec_id=exec_id, signal=request.signal, all=every)
        await call.ask(runtime.TASK_KILL, wanted)
        return Empty()

    async def exec(self, call: Call, request: pb.ExecProcessRequest) -> Empty:
        wanted = runtime.ExecTask(
            exec_id=check_identifier(request.exec_id, "exec id"),
            container_id=_named(call, request.container_id),
            process=typeurls.document_of(request.spec, "process"),
            stdio=Stdio(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal),
        )
        await call.ask(runtime.TASK_EXEC, wanted)
        return Empty()

    async def resize_pty(self, call: Call, request: pb.ResizePtyRequest) -> Empty:
        """Of a process without a terminal nothing changes, and that is no error."""
        id, exec_id = _of(call, request)
        wanted = runtime.ResizeTask(container_id=id, exec_id=exec_id, width=request.width, height=request.height)
        try:
            await call.ask(runtime.TASK_RESIZE, wanted)
        except (FailedPrecondition, NotFound):  # an exec that isn't started isn't there for its shim
            task = await _require(call, _process(call, request))
            if task.stdio.terminal or (exec_id and task.status == "stopped"):
                raise
        return Empty()

    async def close_io(self, call: Call, request: pb.CloseIORequest) -> Empty:
        """Standard input is all that can be closed."""
        if request.stdin:
            await call.ask(runtime.TASK_CLOSE_IO, _process(call, request))
        else:
            await _require(call, _process(call, request))
        return Empty()

    async def pause(self, call: Call, request: pb.PauseTaskRequest) -> Empty:
        await call.ask(runtime.TASK_PAUSE, runtime.TaskRequest(container_id=_named(call, request.container_id)))
        return Empty()

    async def resume(self, call: Call, request: pb.ResumeTaskRequest) -> Empty:
        await call.ask(runtime.TASK_RESUME, runtime.TaskRequest(container_id=_named(call, request.container_id)))
        return Empty()

    async def list_pids(self, call: Call, request: pb.ListPidsRequest) -> pb.ListPidsResponse:
        """None of a task that has stopped."""
        id = _named(call, request.container_id)
        try:
            found = await call.ask(runtime.TASK_PIDS, runtime.TaskRequest(container_id=id))
        except NotFound:
            await _require(call, runtime.ProcessRequest(container_id=id))
            return pb.ListPidsResponse()
        return pb.ListPidsResponse(processes=[_info(one) for one in found.processes])

    async def checkpoint(self, call: Call, request: pb.CheckpointTaskRequest) -> pb.CheckpointTaskResponse:
        """Into a directory of the client's, or else into the content store."""
        asked = CheckpointOptions()
        if request.HasField("options"):
            asked = typeurls.message_of(request.options, CheckpointOptions, "task checkpoint options")
        wanted = runtime.CheckpointTask(
            container_id=_named(call, request.container_id),
            path=asked.image_path,
            work_path=asked.work_path,
            exit=asked.exit,
            open_tcp=asked.open_tcp,
            external_unix_sockets=asked.external_unix_sockets,
            terminal=asked.terminal,
            file_locks=asked.file_locks,
            empty_namespaces=list(asked.empty_namespaces),
        )
        made = await call.ask(runtime.TASK_CHECKPOINT, wanted)
        return pb.CheckpointTaskResponse(descriptors=[descriptor_told(one) for one in made.descriptors])

    async def update(self, call: Call, request: pb.UpdateTaskRequest) -> Empty:
        """The limits of this task: the container's specification stays what its client made it."""
        resources = typeurls.document_of(request.resources, "resources")
        id = _named(call, request.container_id)
        if resources:
            await call.ask(runtime.TASK_UPDATE, runtime.UpdateTask(container_id=id, resources=resources, once=True))
        else:
            await _require(call, runtime.ProcessRequest(container_id=id))
        return Empty()

    async def metrics(self, call: Call, request: pb.MetricsRequest) -> pb.MetricsResponse:
        """Those of stopped tasks, too, until they are deleted."""
        found = call.items(runtime.TASK_METRICS, runtime.ListMetrics(filters=list(request.filters), stopped=True))
        return pb.MetricsResponse(metrics=[_metric(one) async for one in found])

    async def wait(self, call: Call, request: pb.WaitRequest) -> pb.WaitResponse:
        id, exec_id = _of(call, request)
        exit = await call.ask(runtime.TASK_WAIT, runtime.WaitTask(container_id=id, exec_id=exec_id))
        return pb.WaitResponse(exit_status=exit.exit_status, exited_at=timestamp(exit.exited_at))


class _OfProcess(Protocol):
    """A request that concerns one process."""

    @property
    def container_id(self) -> str: ...
    @property
    def exec_id(self) -> str: ...


def _named(call: Call, id: str) -> str:
    return sought(id, f"container {quote(id)} in namespace {quote(call.namespace)}")


def _sought(exec_id: str) -> str:
    return sought(exec_id, f"process {exec_id}")


def _of(call: Call, request: _OfProcess) -> tuple[str, str]:
    """The ids of the container and of the exec, which is empty for the first process. NOT_FOUND for what is none."""
    return _named(call, request.container_id), _sought(request.exec_id) if request.exec_id else ""


def _process(call: Call, request: _OfProcess) -> runtime.ProcessRequest:
    id, exec_id = _of(call, request)
    return runtime.ProcessRequest(container_id=id, exec_id=exec_id)


async def _require(call: Call, process: runtime.ProcessRequest) -> runtime.Task:
    """The process. One that is just being created isn't there yet."""
    task = await call.ask(runtime.TASK_GET, process)
    if task.status not in _STATUS:
        raise NotFound(f"task {task.container_id} not found")
    return task


def _told(task: runtime.Task) -> task_pb2.Process:
    return task_pb2.Process(
        id=task.exec_id or task.container_id,
        pid=task.pid,
        status=_STATUS[task.status],
        stdin=task.stdio.stdin,
        stdout=task.stdio.stdout,
        stderr=task.stdio.stderr,
        terminal=task.stdio.terminal,
        exit_status=task.exit_status,
        exited_at=NEVER if task.exited_at is None else timestamp(task.exited_at),
    )


def _deleted(exit: runtime.Exit) -> pb.DeleteResponse:
    return pb.DeleteResponse(
        id=exit.exec_id, pid=exit.pid, exit_status=exit.exit_status, exited_at=timestamp(exit.exited_at)
    )


def _info(process: runtime.ProcessInfo) -> task_pb2.ProcessInfo:
    told = task_pb2.ProcessInfo(pid=process.pid)
    if process.exec_id:
        details = ProcessDetails(exec_id=process.exec_id)
        told.info.type_url, told.info.value = details.DESCRIPTOR.full_name, details.SerializeToString()
    return told


def _metric(found: runtime.ContainerMetrics) -> Metric:
    figures = task_metrics.figures(found)
    told = Metric(timestamp=timestamp(found.at), id=found.container_id)
    told.data.type_url, told.data.value = figures.DESCRIPTOR.full_name, figures.SerializeToString()
    return told
