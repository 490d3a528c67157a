"""Clients of the gateway that go away in the middle: what they began is undone or whole, and never half of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from shoal_bus.api import snapshot
from shoal_bus.client import Client
from shoal_bus.errors import NotFound
from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import Options
from shoal_gateway.proto.containerd.services.containers.v1 import containers_pb2 as containers
from shoal_gateway.proto.containerd.services.diff.v1.diff_pb2 import ApplyRequest, ApplyResponse
from shoal_gateway.proto.containerd.services.snapshots.v1 import snapshots_pb2 as snapshots
from shoal_gateway.proto.containerd.services.tasks.v1 import tasks_pb2 as tasks
from shoal_gateway.proto.containerd.types.descriptor_pb2 import Descriptor
from shoal_gateway.proto.containerd.v1.types import task_pb2 as types

from tests.support import process_table
from tests.support.gate import Gate, stopped_below
from tests.support.gateway import until
from tests.support.gateway_tasks import CONTAINERS, PROCESS, TASKS, Calls, GatewayNode, document, gateway_node
from tests.support.images import Layer, digest_of, file
from tests.support.leaks import mounts
from tests.support.orphans import in_place_of_init
from tests.support.process_table import Entry
from tests.support.stored import store_blob

SNAPSHOTS = "/containerd.services.snapshots.v1.Snapshots"
APPLY = "/containerd.services.diff.v1.Diff/Apply"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CLIENT = """
import sys, grpc
socket, method, namespace, request = sys.argv[1:]
with grpc.insecure_channel(f"unix:{socket}") as channel:
    channel.unary_unary(method)(bytes.fromhex(request), metadata=(("containerd-namespace", namespace),))
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNode]:
    with in_place_of_init(set) as orphans:
        with gateway_node(tmp_path_factory.mktemp("g"), "content", "snapshot") as made:
            yield made
        for entry in orphans.living():
            entry.signal()
        orphans.reap()


@pytest.fixture
async def calls(node: GatewayNode) -> AsyncIterator[Calls]:
    async with node.calls() as made:
        yield made


@pytest.fixture
async def bus(node: GatewayNode) -> AsyncIterator[Client]:
    async with Client.open(node.node.natsd.address, node.node.name, node.namespace) as client:
        yield client


@pytest.fixture
def gate(tmp_path: Path, node: GatewayNode) -> Iterator[Gate]:
    yield Gate(tmp_path, "runc")
    for entry in stopped_below():  # a test that failed leaves it
        entry.signal()


def through(gate: Gate) -> AnyMessage:
    options = Options(binary_name=gate.path)
    return AnyMessage(type_url=options.DESCRIPTOR.full_name, value=options.SerializeToString())


def begun(calls: Calls, method: str, request: Message, **more: Any) -> grpc.aio.UnaryUnaryCall[bytes, bytes]:
    return calls.channel.unary_unary(method)(request.SerializeToString(), metadata=calls.metadata, **more)


def go_on(held: Entry) -> None:
    assert held.signal(signal.SIGCONT)


def undone(node: GatewayNode) -> int:
    return node.node.of("gateway").log.read_text().count("call.undone")


async def status_of(calls: Calls, id: str, exec_id: str = "") -> int | None:
    try:
        return int((await calls.get(id, exec_id)).status)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return None


# ------------------------------------------------------------------------------------------------ the creation of tasks


def creation(node: GatewayNode, id: str, gate: Gate) -> tasks.CreateTaskRequest:
    return tasks.CreateTaskRequest(container_id=id, rootfs=node.mounts, options=through(gate))


async def none_is_left(node: GatewayNode, calls: Calls, id: str, before: int) -> None:
    """No task, nothing of one, and another one can be had."""
    await until(lambda: undone(node) > before)
    assert await status_of(calls, id) is None
    assert id not in [task.id for task in (await calls.ask(f"{TASKS}/List", b"", tasks.ListTasksResponse)).tasks]
    await calls.create_task(id)
    await calls.end_created(id)


@pytest.mark.parametrize("where", ["before create", "after create"])
async def test_a_task_whose_client_cancels_its_creation_is_undone(
    node: GatewayNode, calls: Calls, gate: Gate, where: str
) -> None:
    await calls.make("cancelled")
    before = undone(node)
    gate.close(where)
    async with calls.events() as told:
        call = begun(calls, f"{TASKS}/Create", creation(node, "cancelled", gate))
        held = await gate.arrived()
        call.cancel()
        go_on(held)
        await none_is_left(node, calls, "cancelled", before)
        await until(lambda: [one.topic for one in told][-1:] == ["/containers/delete"])
    # Of the first one, and of the one that was had afterwards.
    assert [one.topic for one in told] == ["/tasks/create", "/tasks/exit", "/tasks/delete"] * 2 + ["/containers/delete"]


async def test_a_task_whose_client_is_killed_is_undone(node: GatewayNode, calls: Calls, gate: Gate) -> None:
    await calls.make("killed")
    before = undone(node)
    gate.close("before create")
    request = creation(node, "killed", gate).SerializeToString().hex()
    command = [sys.executable, "-c", CLIENT, str(node.socket), f"{TASKS}/Create", node.namespace, request]
    with subprocess.Popen(command) as client:
        held = await gate.arrived()
        client.kill()
    go_on(held)
    await none_is_left(node, calls, "killed", before)


async def test_a_task_that_is_later_than_its_clients_deadline_is_undone(
    node: GatewayNode, calls: Calls, gate: Gate
) -> None:
    await calls.make("late")
    before = undone(node)
    gate.close("before create")
    call = begun(calls, f"{TASKS}/Create", creation(node, "late", gate), timeout=0.3)
    held = await gate.arrived()
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    go_on(held)
    await none_is_left(node, calls, "late", before)


async def test_what_has_failed_anyway_is_not_undone(node: GatewayNode, calls: Calls, gate: Gate) -> None:
    """Another client's task stays."""
    await calls.create("kept")
    call = begun(calls, f"{TASKS}/Create", creation(node, "kept", gate))
    assert await call.code() is grpc.StatusCode.ALREADY_EXISTS
    assert await status_of(calls, "kept") == types.CREATED
    await calls.end_created("kept")


# ------------------------------------------------------------------------------------------ what is done all the same


async def test_a_start_whose_client_goes_away_is_whole(node: GatewayNode, calls: Calls, gate: Gate) -> None:
    pid = await calls.create("started", options=through(gate))
    gate.close("before start")
    call = begun(calls, f"{TASKS}/Start", tasks.StartRequest(container_id="started"))
    held = await gate.arrived()
    call.cancel()
    go_on(held)
    await until_is(calls, "started", types.RUNNING)
    assert (await calls.get("started")).pid == pid
    await calls.end("started")


async def test_an_exec_whose_client_goes_away_is_whole(node: GatewayNode, calls: Calls, gate: Gate) -> None:
    await calls.run("host", options=through(gate))
    process = {"args": ["sleep", "600"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
    call = begun(
        calls, f"{TASKS}/Exec",
        tasks.ExecProcessRequest(container_id="host", exec_id="beside", spec=document(PROCESS, process)),
    )  # fmt: skip
    await asyncio.sleep(0)  # it is sent, perhaps
    call.cancel()
    await asyncio.sleep(0.2)
    if await status_of(calls, "host", "beside") is None:
        await calls.exec("host", "beside", "sleep", "600")
    gate.close("before exec")
    call = begun(calls, f"{TASKS}/Start", tasks.StartRequest(container_id="host", exec_id="beside"))
    held = await gate.arrived()
    call.cancel()
    go_on(held)
    await until_is(calls, "host", types.RUNNING, "beside")
    assert process_table.look((await calls.get("host", "beside")).pid) is not None
    await calls.kill("host", exec_id="beside")
    assert (await calls.wait("host", "beside")).exit_status == 137
    await calls.delete("host", "beside")
    await calls.end("host")


async def until_is(calls: Calls, id: str, status: int, exec_id: str = "") -> None:
    async with asyncio.timeout(15):
        while await status_of(calls, id, exec_id) != status:
            await asyncio.sleep(0.02)


async def test_records_and_snapshots_of_clients_that_go_away_are_whole_or_not_there(
    node: GatewayNode, calls: Calls, bus: Client
) -> None:
    record = calls.container("x", labels={"a": "b"}, image="example.com/x:1", extensions={"e": AnyMessage(value=b"x")})

    async def one(number: int) -> None:
        record_of = containers.Container()
        record_of.CopyFrom(record)
        record_of.id = f"gone-{number}"
        key = f"gone-{number}"
        async with node.calls() as mine:
            made = [
                begun(mine, f"{CONTAINERS}/Create", containers.CreateContainerRequest(container=record_of)),
                begun(mine, f"{SNAPSHOTS}/Prepare", snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key=key)),
            ]
            await asyncio.sleep(0.001 * (number % 12))
            for call in made:
                call.cancel()

    await asyncio.gather(*(one(number) for number in range(60)))
    await asyncio.sleep(0.3)  # what has reached a service is carried out
    found = [id for id in await calls.ids() if id.startswith("gone-")]
    for id in found:
        there = await calls.container_of(id)
        assert (there.spec, dict(there.labels), there.image) == (record.spec, {"a": "b"}, "example.com/x:1")
        assert there.extensions["e"].value == b"x"
        await calls.ask(f"{CONTAINERS}/Delete", containers.DeleteContainerRequest(id=id))
    kept = [one.key for one in await bus.collect(snapshot.SNAPSHOT_LIST.on("overlayfs"), snapshot.ListSnapshots())]
    for key in kept:
        reply = await bus.call(snapshot.SNAPSHOT_MOUNTS.on("overlayfs"), snapshot.SnapshotRequest(key=key))
        assert all(Path(mount.source).is_dir() for mount in reply.mounts)
        await bus.call(snapshot.SNAPSHOT_REMOVE.on("overlayfs"), snapshot.SnapshotRequest(key=key))
    directories = node.node.root / "snapshot" / "overlayfs" / "snapshots"
    assert directories.is_dir()
    await until(lambda: not list(directories.iterdir()))


async def test_a_layer_whose_client_goes_away_is_no_longer_applied(
    node: GatewayNode, calls: Calls, bus: Client
) -> None:
    layer = Layer([file(f"file-{number}", os.urandom(512)) for number in range(6000)], "gzip")
    data = Layer.compress(layer.tar(), layer.compression)
    digest = await store_blob(bus, data)
    before = mounts()
    made = snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key="applied")
    reply = await calls.ask(f"{SNAPSHOTS}/Prepare", made, snapshots.PrepareSnapshotResponse)
    request = ApplyRequest(
        diff=Descriptor(media_type=LAYER, digest=digest, size=len(data)), mounts=reply.mounts, sync_fs=True
    )
    upper = Path(reply.mounts[0].source)
    call = begun(calls, APPLY, request)
    await until(lambda: any(upper.iterdir()))
    call.cancel()
    await until(lambda: not any(upper.iterdir()))
    assert mounts() - before == set()
    again = await calls.ask(APPLY, request, ApplyResponse)  # the snapshot is its client's, as it was
    assert len(list(upper.iterdir())) == 6000
    assert again.applied.digest == digest_of(layer.tar())
    await calls.ask(f"{SNAPSHOTS}/Remove", snapshots.RemoveSnapshotRequest(snapshotter="overlayfs", key="applied"))
    with pytest.raises(NotFound):
        await bus.call(snapshot.SNAPSHOT_STAT.on("overlayfs"), snapshot.SnapshotRequest(key="applied"))


def test_nothing_failed_unexpectedly(node: GatewayNode) -> None:
    for service in node.node.services:
        assert "Traceback" not in service.log.read_text(), service.name
