"""Tasks through the gateway: their whole life, execs, streams, limits and figures, as containerd's clients see them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from shoal_bus.blobs import download, upload
from shoal_bus.client import Client
from shoal_gateway.proto.containerd.events import task_pb2 as events
from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import CheckpointOptions, Options, ProcessDetails
from shoal_gateway.proto.containerd.services.containers.v1.containers_pb2 import DeleteContainerRequest
from shoal_gateway.proto.containerd.services.tasks.v1 import tasks_pb2 as pb
from shoal_gateway.proto.containerd.types.descriptor_pb2 import Descriptor
from shoal_gateway.proto.containerd.v1.types import task_pb2 as types
from shoal_gateway.proto.io.containerd.cgroups.v1.metrics_pb2 import Metrics as MetricsV1
from shoal_gateway.proto.io.containerd.cgroups.v2.metrics_pb2 import Metrics as MetricsV2

from tests.support.archives import tar
from tests.support.gateway import until
from tests.support.gateway_tasks import (
    CHECKPOINTING_RUNTIME,
    CONTAINERS,
    OTHER_RUNTIME,
    PROCESS,
    RESOURCES,
    RUNC_V2,
    SPEC,
    TASKS,
    Calls,
    GatewayNode,
    document,
    gateway_node,
)
from tests.support.images import file, symlink

ZERO = -62_135_596_800
UNIFIED = Path("/sys/fs/cgroup/cgroup.controllers").exists()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNode]:
    with gateway_node(tmp_path_factory.mktemp("n"), "content") as made:
        yield made


@pytest.fixture
async def calls(node: GatewayNode) -> AsyncIterator[Calls]:
    async with node.calls() as opened:
        yield opened


async def refused(calls: Calls, method: str, **fields: Any) -> tuple[str, str]:
    """How a request of that method's is refused."""
    kinds = {"Create": pb.CreateTaskRequest, "Delete": pb.DeleteTaskRequest, "Exec": pb.ExecProcessRequest,
             "Pause": pb.PauseTaskRequest, "Resume": pb.ResumeTaskRequest, "Checkpoint": pb.CheckpointTaskRequest,
             "Update": pb.UpdateTaskRequest}  # fmt: skip
    kind = kinds.get(method) or getattr(pb, f"{method}Request")
    return await calls.refused(f"{TASKS}/{method}", kind(**fields))


def fifo(directory: Path, name: str) -> str:
    path = directory / name
    os.mkfifo(path)
    return str(path)


async def read(path: str) -> bytes:
    return await asyncio.to_thread(Path(path).read_bytes)


# ---------------------------------------------------------------------------------------------------------- one life


async def test_a_task_lives_and_is_told_of_in_order(calls: Calls, tmp_path: Path) -> None:
    out = fifo(tmp_path, "out")
    async with calls.events() as told:
        pid = await calls.create("life", "sh", "-c", "echo hello; exit 7", stdout=out, stderr=fifo(tmp_path, "err"))
        waiting = asyncio.create_task(calls.wait("life"))
        reading = asyncio.create_task(read(out))
        created = await calls.get("life")
        assert (created.id, created.pid, created.status) == ("life", pid, types.CREATED)
        assert (created.stdout, created.terminal, created.exited_at.seconds) == (out, False, ZERO)
        assert await calls.start("life") == pid
        exit = await waiting
        assert exit.exit_status == 7
        assert await reading == b"hello\n"
        stopped = await calls.get("life")
        assert (stopped.status, stopped.exit_status, stopped.exited_at) == (types.STOPPED, 7, exit.exited_at)
        deleted = await calls.delete("life")
        assert (deleted.id, deleted.pid, deleted.exit_status, deleted.exited_at) == ("", pid, 7, exit.exited_at)
        await calls.ask(f"{CONTAINERS}/Delete", DeleteContainerRequest(id="life"))
        await until(lambda: len(told) == 6)
    assert [one.topic for one in told] == [
        "/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete", "/containers/delete",
    ]  # fmt: skip
    made = events.TaskCreate.FromString(told[1].event.value)
    assert (made.container_id, made.pid, made.io.stdout) == ("life", pid, out)
    assert (made.rootfs[0].type, made.rootfs[0].source) == ("bind", str(calls.node.rootfs))
    assert made.bundle
    ended = events.TaskExit.FromString(told[3].event.value)
    assert (ended.container_id, ended.id, ended.pid, ended.exit_status) == ("life", "life", pid, 7)
    assert ended.exited_at == exit.exited_at


async def test_tasks_are_listed_with_their_status_whatever_the_filter(calls: Calls) -> None:
    await calls.create("l-created")
    await calls.run("l-running")
    await calls.run("l-paused")
    await calls.ask(f"{TASKS}/Pause", pb.PauseTaskRequest(container_id="l-paused"))
    await calls.run("l-stopped", "sh", "-c", "exit 3")
    await calls.wait("l-stopped")
    reply = await calls.ask(f"{TASKS}/List", pb.ListTasksRequest(filter="=not a filter="), pb.ListTasksResponse)
    found = {task.id: (task.status, task.exit_status) for task in reply.tasks if task.id.startswith("l-")}
    assert found == {
        "l-created": (types.CREATED, 0), "l-running": (types.RUNNING, 0), "l-paused": (types.PAUSED, 0),
        "l-stopped": (types.STOPPED, 3),
    }  # fmt: skip
    for id in found:
        if id != "l-stopped":
            await calls.end(id)


async def test_a_second_task_and_a_task_of_nothing_are_refused(calls: Calls) -> None:
    await calls.create("one")
    code, _ = await refused(calls, "Create", container_id="one", rootfs=calls.node.mounts)
    assert code == "ALREADY_EXISTS"
    for method in ("Create", "Start", "Delete", "Get", "Kill", "Pause", "Resume", "ListPids", "Wait", "CloseIO"):
        more = {"signal": 9} if method == "Kill" else {"stdin": True} if method == "CloseIO" else {}
        assert (await refused(calls, method, container_id="nothing", **more))[0] == "NOT_FOUND", method
    await calls.make("taskless")
    for method in ("Start", "Delete", "Get", "Pause", "ListPids", "Wait"):
        assert (await refused(calls, method, container_id="taskless"))[0] == "NOT_FOUND", method


async def test_a_running_task_must_be_stopped_before_deletion(calls: Calls) -> None:
    await calls.run("stays")
    code, message = await refused(calls, "Delete", container_id="stays")
    assert code == "FAILED_PRECONDITION"
    assert "must be stopped before deletion" in message
    code, _ = await calls.refused(f"{CONTAINERS}/Delete", DeleteContainerRequest(id="stays"))
    assert code == "FAILED_PRECONDITION"
    assert (await calls.get("stays")).status == types.RUNNING
    await calls.end("stays")


async def test_a_created_task_can_be_deleted(calls: Calls) -> None:
    await calls.create("unstarted")
    assert (await calls.delete("unstarted")).exit_status == 137
    assert (await refused(calls, "Get", container_id="unstarted"))[0] == "NOT_FOUND"


async def test_a_started_task_cant_be_started(calls: Calls) -> None:
    await calls.run("started")
    assert (await refused(calls, "Start", container_id="started"))[0] == "FAILED_PRECONDITION"
    await calls.end("started")


# -------------------------------------------------------------------------------------------------------------- signals


async def test_what_has_finished_cant_be_killed(calls: Calls) -> None:
    await calls.run("finished")
    comm = Path("/proc", str((await calls.get("finished")).pid), "comm")
    async with asyncio.timeout(20):
        while comm.read_text().startswith("runc"):  # it has been let go, and does hear signals until it is replaced
            await asyncio.sleep(0.01)
    await calls.kill("finished", 15)  # a PID 1 without a handler doesn't hear it
    assert (await calls.get("finished")).status == types.RUNNING
    await calls.kill("finished")
    assert (await calls.wait("finished")).exit_status == 137
    code, message = await refused(calls, "Kill", container_id="finished", signal=15)
    assert code == "NOT_FOUND"
    assert "already finished" in message


async def test_a_signal_to_all_reaches_what_isnt_the_first_process(calls: Calls) -> None:
    await calls.run("all", "sh", "-c", "trap : USR1; sleep 600 & wait; wait; sleep 600")
    await calls.exec("all", "beside", "sleep", "600")
    await calls.start("all", "beside")
    await calls.kill("all", 9, all=True)
    assert (await calls.wait("all", "beside")).exit_status == 137
    assert (await calls.wait("all")).exit_status == 137


@pytest.mark.parametrize("signal", [65, 1 << 31])
async def test_signals_that_arent_are_invalid_arguments(calls: Calls, signal: int) -> None:
    assert (await refused(calls, "Kill", container_id="x", signal=signal))[0] == "INVALID_ARGUMENT"


async def test_a_process_without_a_terminal_has_no_size_and_that_is_no_error(calls: Calls) -> None:
    """As with containerd, whose clients pass sizes on without looking what there is."""
    assert (await refused(calls, "ResizePty", container_id="sized", width=80, height=24))[0] == "NOT_FOUND"
    await calls.create("sized")
    size = pb.ResizePtyRequest(container_id="sized", width=80, height=24)
    await calls.ask(f"{TASKS}/ResizePty", size)
    await calls.start("sized")
    await calls.ask(f"{TASKS}/ResizePty", size)
    await calls.exec("sized", "beside", "sleep", "600")
    size.exec_id = "beside"
    await calls.ask(f"{TASKS}/ResizePty", size)
    await calls.kill("sized")
    await calls.wait("sized")
    await calls.ask(f"{TASKS}/ResizePty", pb.ResizePtyRequest(container_id="sized", width=80, height=24))
    await calls.delete("sized")


async def test_a_stopped_task_has_figures_and_no_processes(calls: Calls) -> None:
    """As with containerd, whose clients take the last figures of a container from there."""
    await calls.run("over", "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done")
    await calls.wait("over")
    of_it = pb.MetricsRequest(filters=["id==over"])
    reply = await calls.ask(f"{TASKS}/Metrics", of_it, pb.MetricsResponse)
    assert [one.id for one in reply.metrics] == ["over"]
    told = reply.metrics[0].data
    kind = {one.DESCRIPTOR.full_name: one for one in (MetricsV1, MetricsV2)}[told.type_url]
    assert kind.FromString(told.value).pids.current == 0
    assert kind.FromString(told.value).cpu.ByteSize() > 0
    assert not (
        await calls.ask(f"{TASKS}/ListPids", pb.ListPidsRequest(container_id="over"), pb.ListPidsResponse)
    ).processes
    await calls.delete("over")
    assert not (await calls.ask(f"{TASKS}/Metrics", of_it, pb.MetricsResponse)).metrics
    assert (await refused(calls, "ListPids", container_id="over"))[0] == "NOT_FOUND"


async def test_signal_0_looks_whether_a_process_is_there(calls: Calls) -> None:
    assert (await refused(calls, "Kill", container_id="looked", signal=0))[0] == "NOT_FOUND"
    await calls.run("looked")
    await calls.kill("looked", 0)
    assert (await calls.get("looked")).status == types.RUNNING
    await calls.kill("looked")
    await calls.wait("looked")
    assert (await refused(calls, "Kill", container_id="looked", signal=0))[0] == "NOT_FOUND"
    await calls.delete("looked")


# ---------------------------------------------------------------------------------------------------------------- execs


async def test_an_exec_lives_beside_the_first_process(calls: Calls, tmp_path: Path) -> None:
    await calls.run("host")
    out = fifo(tmp_path, "out")
    async with calls.events() as told:
        await calls.exec("host", "x-1", "sh", "-c", "echo $0; exit 4", stdout=out)
        added = await calls.get("host", "x-1")
        assert (added.id, added.pid, added.status, added.stdout) == ("x-1", 0, types.CREATED, out)
        code, _ = await refused(calls, "Kill", container_id="host", exec_id="x-1", signal=9)
        assert code == "FAILED_PRECONDITION"  # it hasn't been started
        reading = asyncio.create_task(read(out))
        waiting = asyncio.create_task(calls.wait("host", "x-1"))
        pid = await calls.start("host", "x-1")
        assert (await waiting).exit_status == 4
        assert await reading == b"sh\n"
        deleted = await calls.delete("host", "x-1")
        assert (deleted.id, deleted.pid, deleted.exit_status) == ("x-1", pid, 4)
        await until(lambda: len(told) == 3)
    assert [one.topic for one in told] == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
    ended = events.TaskExit.FromString(told[2].event.value)
    assert (ended.container_id, ended.id, ended.pid, ended.exit_status) == ("host", "x-1", pid, 4)
    assert (await refused(calls, "Get", container_id="host", exec_id="x-1"))[0] == "NOT_FOUND"
    await calls.end("host")


async def test_an_exec_with_a_terminal_has_the_size_it_is_given(calls: Calls, tmp_path: Path) -> None:
    await calls.run("tty-host")
    source, out = fifo(tmp_path, "in"), fifo(tmp_path, "out")
    await calls.exec("tty-host", "t", "sh", "-c", "read x; stty size; tty", terminal=True, stdin=source, stdout=out)
    writer = await asyncio.to_thread(os.open, source, os.O_RDWR)
    reading = asyncio.create_task(read(out))
    await calls.start("tty-host", "t")
    resize = pb.ResizePtyRequest(container_id="tty-host", exec_id="t", width=91, height=33)
    await calls.ask(f"{TASKS}/ResizePty", resize)
    os.write(writer, b"go\n")
    assert (await calls.wait("tty-host", "t")).exit_status == 0
    os.close(writer)
    shown = await reading
    assert b"33 91\r\n" in shown
    assert b"/dev/pts/" in shown
    await calls.end("tty-host")


async def test_closing_standard_input_is_its_end(calls: Calls, tmp_path: Path) -> None:
    source, out = fifo(tmp_path, "in"), fifo(tmp_path, "out")
    await calls.run("cat", "cat", stdin=source, stdout=out)
    reading = asyncio.create_task(read(out))
    await asyncio.to_thread(Path(source).write_bytes, b"some words")
    await calls.ask(f"{TASKS}/CloseIO", pb.CloseIORequest(container_id="cat"))  # nothing is to be closed
    assert (await calls.get("cat")).status == types.RUNNING
    await calls.ask(f"{TASKS}/CloseIO", pb.CloseIORequest(container_id="cat", stdin=True))
    assert (await calls.wait("cat")).exit_status == 0
    assert await reading == b"some words"


async def test_processes_are_told_with_the_exec_they_are(calls: Calls) -> None:
    pid = await calls.run("pids")
    await calls.exec("pids", "second", "sleep", "600")
    second = await calls.start("pids", "second")
    reply = await calls.ask(f"{TASKS}/ListPids", pb.ListPidsRequest(container_id="pids"), pb.ListPidsResponse)
    found = {one.pid: one.info for one in reply.processes}
    assert found.keys() == {pid, second}
    assert not found[pid].type_url
    assert found[second].type_url == "containerd.runc.v1.ProcessDetails"
    assert ProcessDetails.FromString(found[second].value).exec_id == "second"
    code, _ = await refused(calls, "DeleteProcess", container_id="pids", exec_id="second")
    assert code == "FAILED_PRECONDITION"
    await calls.end("pids")
    assert (await refused(calls, "ListPids", container_id="pids"))[0] == "NOT_FOUND"


async def test_execs_that_cant_be_are_refused(calls: Calls) -> None:
    await calls.run("refuses")
    process = document(PROCESS, {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
    common: dict[str, Any] = {"container_id": "refuses", "exec_id": "e"}
    code, message = await refused(calls, "Exec", container_id="refuses", spec=process)
    assert (code, "exec id" in message) == ("INVALID_ARGUMENT", True)
    for value in (b"", b"\xff", b"[]", b"null", b'{"args": []}', b'{"args": ["x"], "cwd": 5}', b"[" * 100_000):
        bad = AnyMessage(type_url=PROCESS, value=value)
        assert (await refused(calls, "Exec", **common, spec=bad))[0] == "INVALID_ARGUMENT", value[:20]
    await calls.exec("refuses", "e", "sleep", "600")
    assert (await refused(calls, "Exec", **common, spec=process))[0] == "ALREADY_EXISTS"
    await calls.exec("refuses", "absent", "nothing404")
    code, message = await refused(calls, "Start", container_id="refuses", exec_id="absent")
    assert code == "FAILED_PRECONDITION"
    assert message.startswith("OCI runtime exec failed: ")
    assert "executable file not found in $PATH" in message
    assert (await refused(calls, "Get", container_id="refuses", exec_id="other"))[0] == "NOT_FOUND"
    await calls.end("refuses")
    assert (await refused(calls, "Exec", **common, spec=process))[0] == "NOT_FOUND"


async def test_a_paused_task_takes_no_exec_until_it_is_resumed(calls: Calls) -> None:
    await calls.run("paused")
    async with calls.events() as told:
        await calls.ask(f"{TASKS}/Pause", pb.PauseTaskRequest(container_id="paused"))
        assert (await calls.get("paused")).status == types.PAUSED
        assert (await refused(calls, "Pause", container_id="paused"))[0] == "FAILED_PRECONDITION"
        process = document(PROCESS, {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
        code, _ = await refused(calls, "Exec", container_id="paused", exec_id="e", spec=process)
        assert code == "FAILED_PRECONDITION"
        await calls.ask(f"{TASKS}/Resume", pb.ResumeTaskRequest(container_id="paused"))
        assert (await refused(calls, "Resume", container_id="paused"))[0] == "FAILED_PRECONDITION"
        await until(lambda: len(told) == 2)
    assert [one.topic for one in told] == ["/tasks/paused", "/tasks/resumed"]
    await calls.end("paused")


# -------------------------------------------------------------------------------------------------- limits and figures


def cgroup(pid: int, controller: str) -> Path:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}")
    return Path(f"/sys/fs/cgroup{Path(f'/proc/{pid}/cgroup').read_text().strip().split(':')[2]}")


async def test_limits_are_changed_for_this_task_and_the_specification_stays(calls: Calls) -> None:
    pid = await calls.run("limited")
    before = await calls.container_of("limited")
    async with calls.events() as told:
        resources = document(RESOURCES, {"memory": {"limit": 48 << 20}, "cpu": {"shares": 512}})
        request = pb.UpdateTaskRequest(container_id="limited", resources=resources, annotations={"a": "b"})
        await calls.ask(f"{TASKS}/Update", request)
        empty = pb.UpdateTaskRequest(container_id="limited", resources=document(RESOURCES, {}))
        await calls.ask(f"{TASKS}/Update", empty)
        file = "memory.max" if UNIFIED else "memory.limit_in_bytes"
        assert int((cgroup(pid, "memory") / file).read_text()) == 48 << 20
        assert await calls.container_of("limited") == before
        await calls.end("limited")
        await until(lambda: len(told) == 3)
    assert [one.topic for one in told] == ["/tasks/exit", "/tasks/delete", "/containers/delete"]
    assert (await refused(calls, "Update", container_id="limited", resources=resources))[0] == "NOT_FOUND"
    for value in (b"", b"[]", b'{"memory": 5}', b'{"memory": {"limit": "x"}}'):
        await calls.make(f"no-{len(value)}")
        bad = AnyMessage(type_url=RESOURCES, value=value)
        assert (await refused(calls, "Update", container_id=f"no-{len(value)}", resources=bad))[0] in (
            "INVALID_ARGUMENT", "NOT_FOUND",
        )  # fmt: skip


async def test_figures_are_those_of_the_tasks_cgroups(calls: Calls) -> None:
    resources = {"memory": {"limit": 64 << 20}, "pids": {"limit": 33}}
    spec = calls.node.spec("sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 600")
    spec["linux"]["resources"] = resources
    await calls.run("measured", container={"spec": document(SPEC, spec)})
    await calls.run("unlimited")

    async def metrics(*filters: str) -> dict[str, Any]:
        reply = await calls.ask(f"{TASKS}/Metrics", pb.MetricsRequest(filters=filters), pb.MetricsResponse)
        return {metric.id: metric for metric in reply.metrics}

    kind = MetricsV2 if UNIFIED else MetricsV1
    found = await metrics("id==measured")
    assert found.keys() == {"measured"}
    assert found["measured"].data.type_url == f"io.containerd.cgroups.v{2 if UNIFIED else 1}.Metrics"
    assert found["measured"].timestamp.seconds > 1_700_000_000
    figures = kind.FromString(found["measured"].data.value)
    unlimited = kind.FromString((await metrics("id==unlimited"))["unlimited"].data.value)
    assert (figures.pids.current, figures.pids.limit) in ((1, 33), (2, 33))
    if UNIFIED:
        assert figures.memory.usage_limit == 64 << 20
        assert figures.cpu.usage_usec > 0
        assert unlimited.memory.usage_limit == unlimited.pids.limit == (1 << 64) - 1
    else:
        assert 0 < figures.memory.usage.usage <= figures.memory.usage.max <= figures.memory.usage.limit == 64 << 20
        assert figures.memory.hierarchical_memory_limit == 64 << 20
        assert figures.memory.total_rss == figures.memory.rss > 0
        assert sum(figures.cpu.usage.per_cpu) == figures.cpu.usage.total > 0
        assert (unlimited.memory.usage.limit, unlimited.pids.limit) == (9_223_372_036_854_771_712, 0)
    both = await metrics("id==measured", "id==unlimited")
    assert both.keys() == {"measured", "unlimited"}
    assert both.keys() <= (await metrics(f"namespace=={calls.node.namespace}")).keys()
    assert await metrics("id==nothing") == {}
    assert (await refused(calls, "Metrics", filters=["id=="]))[0] == "INVALID_ARGUMENT"
    await calls.end("measured")
    await calls.end("unlimited")


# ------------------------------------------------------------------------------------------------------------- runtimes


OTHER = Options(binary_name=OTHER_RUNTIME)
RUNTIMES = [
    ({"name": RUNC_V2}, {}, "runc"),
    ({"name": "io.containerd.runtime.v1.linux"}, {}, "runc"),
    ({"name": "/usr/bin/containerd-shim-runc-v2"}, {}, "runc"),
    ({"name": RUNC_V2, "options": OTHER}, {}, OTHER_RUNTIME),
    ({"name": f"io.containerd.{OTHER_RUNTIME}.v1"}, {}, OTHER_RUNTIME),
    ({"name": RUNC_V2, "options": OTHER}, {"options": Options(no_new_keyring=True)}, "runc"),
    ({"name": RUNC_V2}, {"runtime_path": f"/opt/containerd-shim-{OTHER_RUNTIME}-v2"}, OTHER_RUNTIME),
]


def packed(fields: dict[str, Any]) -> dict[str, Any]:
    if "options" not in fields:
        return fields
    options = AnyMessage(type_url="containerd.runc.v1.Options", value=fields["options"].SerializeToString())
    return {**fields, "options": options}


@pytest.mark.parametrize(("runtime", "task", "program"), RUNTIMES, ids=range(len(RUNTIMES)))
async def test_the_runtime_is_what_its_name_and_options_say(
    node: GatewayNode, calls: Calls, runtime: dict[str, Any], task: dict[str, Any], program: str
) -> None:
    id = f"runtime-{RUNTIMES.index((runtime, task, program))}"
    await calls.create(id, container={"runtime": packed(runtime)}, **packed(task))
    records = [json.loads(path.read_text()) for path in (node.node.state / "runtime" / "shims").glob("*/shim.json")]
    assert [Path(one["runtime"]).name for one in records if one["id"] == id] == [program]
    await calls.start(id)
    await calls.end(id)


async def test_runcs_root_is_where_the_options_say(calls: Calls, tmp_path: Path) -> None:
    await calls.run("rooted", **packed({"options": Options(root=str(tmp_path / "roots"))}))
    assert (tmp_path / "roots" / calls.node.namespace / "rooted" / "state.json").exists()
    await calls.end("rooted")


async def test_tasks_that_cant_be_made_are_refused_in_containerds_words(calls: Calls) -> None:
    async with calls.events("topic~=/tasks/") as told:
        code, message = await self_refused(calls, "absent", container={"args": ["nothing404"]})
        assert (code, message.partition(": ")[0]) == ("FAILED_PRECONDITION", "OCI runtime create failed")
        assert "executable file not found in $PATH" in message
        code, message = await self_refused(
            calls,
            "no-runc",
            container={"runtime": packed({"name": RUNC_V2, "options": Options(binary_name="no-runc")})},
        )
        assert (code, '"no-runc"' in message) == ("FAILED_PRECONDITION", True)
        code, message = await self_refused(
            calls, "foreign",
            container={"runtime": {"name": RUNC_V2, "options": AnyMessage(type_url="x.Unknown", value=b"1")}},
        )  # fmt: skip
        assert (code, "x.Unknown" in message) == ("INVALID_ARGUMENT", True)
        assert not told
    # With options of its own the task doesn't need the container's.
    await calls.create_task("foreign", **packed({"options": Options()}))
    await calls.end_created("foreign")


async def self_refused(calls: Calls, id: str, *, container: dict[str, Any], **task: Any) -> tuple[str, str]:
    """How the task of a new container is refused."""
    args = container.pop("args", ["sleep", "600"])
    await calls.make(id, *args, **container)
    return await refused(calls, "Create", container_id=id, rootfs=calls.node.mounts, **task)


SPECS = [
    b"",
    b"\xff",
    b"[]",
    b"{}",
    b"null",
    b'{"ociVersion": 5}',
    b'{"ociVersion": "1.0.2", "process": []}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("value", SPECS, ids=range(len(SPECS)))
async def test_a_specification_that_is_none_is_told_when_a_task_is_made(calls: Calls, value: bytes) -> None:
    id = f"spec-{SPECS.index(value)}"
    await calls.make(id, spec=AnyMessage(type_url=SPEC, value=value))
    assert (await calls.container_of(id)).spec.value == value
    code, message = await refused(calls, "Create", container_id=id, rootfs=calls.node.mounts)
    assert code == "INVALID_ARGUMENT"
    assert message.startswith("spec: ")


async def test_bad_requests_for_tasks_are_refused(calls: Calls, tmp_path: Path) -> None:
    await calls.make("asked")
    common: dict[str, Any] = {"container_id": "asked", "rootfs": calls.node.mounts}
    assert (await refused(calls, "Create", **{**common, "container_id": "../x"}))[0] == "NOT_FOUND"
    wrong = AnyMessage(type_url="containerd.runc.v1.CheckpointOptions")
    assert (await refused(calls, "Create", **common, options=wrong))[0] == "INVALID_ARGUMENT"
    garbage = AnyMessage(type_url="containerd.runc.v1.Options", value=b"\xff")
    assert (await refused(calls, "Create", **common, options=garbage))[0] == "INVALID_ARGUMENT"
    absent = str(tmp_path / "absent")
    assert (await refused(calls, "Create", **common, stdout=absent))[0] == "FAILED_PRECONDITION"
    assert (await refused(calls, "Create", **common, stdout="tcp://1.2.3.4"))[0] == "INVALID_ARGUMENT"
    restored = Descriptor(annotations={"RestoreFromPath": absent})
    assert (await refused(calls, "Create", **common, checkpoint=restored))[0] == "NOT_FOUND"
    assert (await refused(calls, "Create", **common, task_api_address="unix:///x"))[0] == "UNIMPLEMENTED"
    mount = {"type": "nosuchfs", "source": "x"}
    assert (await refused(calls, "Create", container_id="asked", rootfs=[mount]))[0] == "FAILED_PRECONDITION"
    assert await calls.create_task("asked") > 0
    await calls.end_created("asked")


async def test_a_checkpoint_without_criu_says_so(calls: Calls, tmp_path: Path) -> None:
    await calls.run("frozen")
    options = CheckpointOptions(image_path=str(tmp_path / "images"))
    asked = AnyMessage(type_url="containerd.runc.v1.CheckpointOptions", value=options.SerializeToString())
    code, message = await refused(calls, "Checkpoint", container_id="frozen", options=asked)
    assert code == "FAILED_PRECONDITION"
    assert "criu" in message.lower()
    assert not (tmp_path / "images").exists()
    code, message = await refused(calls, "Checkpoint", container_id="frozen")
    assert (code, "criu" in message.lower()) == ("FAILED_PRECONDITION", True)
    assert (await calls.get("frozen")).status == types.RUNNING
    await calls.end("frozen")


@asynccontextmanager
async def content_of(node: GatewayNode) -> AsyncIterator[Client]:
    """A client of the node's content, in the containers' namespace."""
    async with Client.open(node.node.natsd.address, node.node.name, node.namespace) as client:
        yield client


async def test_a_checkpoint_is_kept_as_content_and_a_task_comes_back_from_it(node: GatewayNode, calls: Calls) -> None:
    runtime = packed({"name": RUNC_V2, "options": Options(binary_name=CHECKPOINTING_RUNTIME)})
    await calls.run("dumped", container={"runtime": runtime})
    mine = f"namespace=={node.namespace},topic~=|^/tasks/|"
    async with calls.events(mine) as told, content_of(node) as client:
        request = pb.CheckpointTaskRequest(container_id="dumped")
        reply = await calls.ask(f"{TASKS}/Checkpoint", request, pb.CheckpointTaskResponse)
        images, spec = reply.descriptors
        blobs = [b"".join([data async for data in download(client, one.digest)]) for one in (images, spec)]
        await until(lambda: told)
    assert [one.topic for one in told] == ["/tasks/checkpointed"]
    assert [len(blob) for blob in blobs] == [images.size, spec.size]
    assert images.media_type == "application/vnd.containerd.container.criu.checkpoint.criu.tar"
    assert spec.media_type == "application/vnd.containerd.container.checkpoint.config.v1+proto"
    with tarfile.open(fileobj=io.BytesIO(blobs[0])) as archive:
        assert archive.getnames() == ["core-1.img", "descriptors.json"]
    assert AnyMessage.FromString(blobs[1]) == (await calls.container_of("dumped")).spec
    bundle = node.node.state / "runtime" / "bundles" / node.namespace / "dumped"
    assert {path.name for path in bundle.iterdir()} <= {"config.json", "rootfs", "log", "shim-binary-path"}
    await calls.end("dumped")
    assert await calls.create("restored", container={"runtime": runtime}, checkpoint=images) == 0
    pid = await calls.start("restored")
    assert ((await calls.get("restored")).pid, pid > 0) == (pid, True)
    await calls.end("restored")


async def test_what_is_no_checkpoint_is_restored_from_nowhere(node: GatewayNode, calls: Calls) -> None:
    await calls.make("hostile")
    media_type = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
    common: dict[str, Any] = {"container_id": "hostile", "rootfs": calls.node.mounts}
    archives = [
        tar([file("../outside", b"x")]), tar([file("/outside", b"x")]), tar([file("sub/x", b"x")]), b"no archive" * 200,
        tar([symlink("core-1.img", "/etc/passwd")]), tar([file("x", b"1"), file("x", b"2")]), tar([file(".hidden")]),
    ]  # fmt: skip
    async with content_of(node) as client:
        for archive in archives:
            digest = await upload(client, io.BytesIO(archive), total=len(archive))
            given = Descriptor(media_type=media_type, digest=digest, size=len(archive))
            assert (await refused(calls, "Create", **common, checkpoint=given))[0] == "INVALID_ARGUMENT"
            other = Descriptor(media_type="application/x-tar", digest=digest, size=len(archive))
            assert (await refused(calls, "Create", **common, checkpoint=other))[0] == "INVALID_ARGUMENT"
    absent = Descriptor(media_type=media_type, digest=f"sha256:{'0' * 64}")
    assert (await refused(calls, "Create", **common, checkpoint=absent))[0] == "NOT_FOUND"
    nothing = Descriptor(media_type=media_type, digest="sha256:x")
    assert (await refused(calls, "Create", **common, checkpoint=nothing))[0] == "INVALID_ARGUMENT"
    assert not (node.node.state / "runtime" / "bundles" / node.namespace / "hostile").exists()


@pytest.mark.parametrize("method", [
    "Create", "Start", "Delete", "DeleteProcess", "Get", "List", "Kill", "Exec", "ResizePty", "CloseIO", "Pause",
    "Resume", "ListPids", "Checkpoint", "Update", "Metrics", "Wait",
])  # fmt: skip
async def test_what_is_no_protobuf_is_refused_as_containerd_does(calls: Calls, method: str) -> None:
    code, message = await calls.refused(f"{TASKS}/{method}", b"\x0a\xff\x01x")
    assert code == "INTERNAL"
    assert message.startswith("grpc: error unmarshalling request")


# ----------------------------------------------------------------------------------------------------------- endurance


async def test_a_wait_that_is_given_up_leaves_nothing(node: GatewayNode, calls: Calls) -> None:
    process = psutil.Process(node.node.of("gateway").pid)
    await calls.run("waited")
    settled = process.num_fds()
    for _ in range(20):
        waits = [
            calls.channel.unary_unary(f"{TASKS}/Wait")(
                pb.WaitRequest(container_id="waited").SerializeToString(), metadata=calls.metadata
            )
            for _ in range(5)
        ]
        await asyncio.sleep(0.01)
        for wait in waits:
            wait.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await calls.channel.unary_unary(f"{TASKS}/Wait")(
            pb.WaitRequest(container_id="waited").SerializeToString(), metadata=calls.metadata, timeout=0.3
        )
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: process.num_fds() <= settled)
    await calls.end("waited")


async def test_a_wait_outlives_the_runtime_service(node: GatewayNode, calls: Calls) -> None:
    pid = await calls.run("survivor")
    waiting = asyncio.create_task(calls.wait("survivor"))
    runtime = node.node.of("runtime")
    await asyncio.sleep(0.1)
    runtime.kill()
    await asyncio.to_thread(runtime.start)
    task = await calls.get("survivor")
    assert (task.pid, task.status) == (pid, types.RUNNING)
    await calls.kill("survivor")
    assert (await waiting).exit_status == 137
    await calls.delete("survivor")


def test_nothing_that_was_refused_left_a_traceback(node: GatewayNode) -> None:
    for service in ("gateway", "runtime"):
        log = node.node.of(service).log.read_text()
        found = [line for line in log.splitlines() if "Traceback" in line]
        assert not found, json.loads(found[0]) if found[0].startswith("{") else found
