"""Sandboxes through the gateway: the store, and the controller over containers that share a shim."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from shoal_bus.api import content
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.connection import connect
from shoal_gateway.proto.containerd.services.sandbox.v1 import sandbox_pb2 as pb
from shoal_gateway.proto.containerd.types.sandbox_pb2 import Sandbox

from tests.support import bundle as bundles
from tests.support.gateway import refusal, rpc, socket_of
from tests.support.images import digest_of
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.runtime import RuntimeNode, runtime_node

STORE = "/containerd.services.sandbox.v1.Store"
CONTROLLER = "/containerd.services.sandbox.v1.Controller"
SPEC = Any(type_url="types.containerd.io/opencontainers/runtime-spec/1/Spec", value=b'{"ociVersion": "1.1.0"}')
OPTIONS = Any(type_url="containerd.runc.v1.Options", value=b"\x08\x01")
EXTENSION = Any(type_url="example.com/anything", value=b"\xff\x00")


class Namespace:
    """A client's calls, in one namespace."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self._channel, self.metadata = channel, (("containerd-namespace", name),)

    async def ask(self, method: str, request: Message) -> Message:
        """The reply, of the class that the request's name has with Response for Request."""
        reply = getattr(pb, type(request).__name__.replace("Request", "Response"))
        answer: Message = await rpc(self._channel, method, request, reply=reply, metadata=self.metadata)
        return answer

    async def refused(self, method: str, request: Message) -> str:
        return (await refusal(self._channel, method, request, metadata=self.metadata))[0]

    async def create(self, id: str, **labels: str) -> Sandbox:
        asked = Sandbox(
            sandbox_id=id, runtime=Sandbox.Runtime(name="io.containerd.runc.v2", options=OPTIONS), spec=SPEC,
            labels=labels, extensions={"kept": EXTENSION}, sandboxer="podsandbox",
        )  # fmt: skip
        return (await self.ask(f"{STORE}/Create", pb.StoreCreateRequest(sandbox=asked))).sandbox

    async def update(self, sandbox: Sandbox, *fields: str) -> Sandbox:
        return (await self.ask(f"{STORE}/Update", pb.StoreUpdateRequest(sandbox=sandbox, fields=fields))).sandbox

    async def get(self, id: str) -> Sandbox:
        return (await self.ask(f"{STORE}/Get", pb.StoreGetRequest(sandbox_id=id))).sandbox

    async def ids(self, *filters: str) -> list[str]:
        listed = await self.ask(f"{STORE}/List", pb.StoreListRequest(filters=filters))
        return [one.sandbox_id for one in listed.list]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("n")
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("content", "snapshot", "runtime", "gateway")
        yield made


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as opened:
        yield opened


async def test_a_sandbox_is_kept_as_it_was_given(channel: grpc.aio.Channel) -> None:
    mine = Namespace(channel, "kept")
    made = await mine.create("pod-1", app="web")
    assert (made.spec, made.runtime.options, made.extensions["kept"]) == (SPEC, OPTIONS, EXTENSION)
    assert (made.runtime.name, made.sandboxer) == ("io.containerd.runc.v2", "podsandbox")
    assert made.created_at == made.updated_at
    assert made.created_at.seconds > 0
    assert await mine.get("pod-1") == made
    assert await mine.refused(f"{STORE}/Create", pb.StoreCreateRequest(sandbox=made)) == "ALREADY_EXISTS"
    assert await Namespace(channel, "other").ids() == []
    await mine.ask(f"{STORE}/Delete", pb.StoreDeleteRequest(sandbox_id="pod-1"))
    assert await mine.refused(f"{STORE}/Get", pb.StoreGetRequest(sandbox_id="pod-1")) == "NOT_FOUND"
    assert await mine.refused(f"{STORE}/Delete", pb.StoreDeleteRequest(sandbox_id="pod-1")) == "NOT_FOUND"


async def test_lists_of_any_length_take_filters(channel: grpc.aio.Channel) -> None:
    mine = Namespace(channel, "listed")
    every = [f"pod-{number:03}" for number in range(70)]
    for number, id in enumerate(every):
        await mine.create(id, tier="odd" if number % 2 else "even")
    assert await mine.ids() == every
    assert await mine.ids("labels.tier==odd") == every[1::2]
    assert await mine.ids("id==pod-003", "id~=^pod-06[0-2]$,labels.tier==even") == ["pod-003", "pod-060", "pod-062"]
    assert await mine.ids("runtime.name==io.containerd.runc.v2") == []  # containerd knows no such field either
    assert await mine.refused(f"{STORE}/List", pb.StoreListRequest(filters=["id=="])) == "INVALID_ARGUMENT"


async def test_an_update_changes_what_its_fields_name(channel: grpc.aio.Channel) -> None:
    mine = Namespace(channel, "updated")
    made = await mine.create("pod", a="1", b="2")
    change = Sandbox(sandbox_id="pod", labels={"a": "9", "c": "3"}, extensions={"new": EXTENSION})
    changed = await mine.update(change, "labels.a", "labels.b", "extensions.new")
    assert dict(changed.labels) == {"a": "9"}
    assert sorted(changed.extensions) == ["kept", "new"]
    assert (changed.spec, changed.runtime, changed.created_at) == (made.spec, made.runtime, made.created_at)
    assert changed.updated_at.ToNanoseconds() > made.updated_at.ToNanoseconds()
    assert await mine.get("pod") == changed
    assert list((await mine.update(change, "extensions.kept")).extensions) == ["new"]
    change.runtime.name = "io.containerd.runc.v2"
    whole = await mine.update(change)
    assert (dict(whole.labels), list(whole.extensions)) == ({"a": "9", "c": "3"}, ["new"])
    assert not whole.HasField("spec")
    assert not whole.runtime.HasField("options")
    change.runtime.name = "other"
    assert await mine.refused(f"{STORE}/Update", pb.StoreUpdateRequest(sandbox=change)) == "INVALID_ARGUMENT"
    assert (await mine.update(change, "runtime")).runtime.name == "other"
    for wrong in ("sandboxer", "label", "labels.", ""):
        asked = pb.StoreUpdateRequest(sandbox=change, fields=[wrong])
        assert await mine.refused(f"{STORE}/Update", asked) == "INVALID_ARGUMENT", wrong
    change.sandbox_id = "none"
    assert await mine.refused(f"{STORE}/Update", pb.StoreUpdateRequest(sandbox=change)) == "NOT_FOUND"


@pytest.mark.parametrize("id", ["", "no/pod", "x" * 77, "-pod"])
async def test_an_id_that_is_none_is_refused(channel: grpc.aio.Channel, id: str) -> None:
    mine = Namespace(channel, "wrong")
    sandbox = Sandbox(sandbox_id=id)
    for method, request in (
        (f"{STORE}/Create", pb.StoreCreateRequest(sandbox=sandbox)),
        (f"{STORE}/Update", pb.StoreUpdateRequest(sandbox=sandbox)),
        (f"{STORE}/Get", pb.StoreGetRequest(sandbox_id=id)),
        (f"{STORE}/Delete", pb.StoreDeleteRequest(sandbox_id=id)),
        (f"{CONTROLLER}/Create", pb.ControllerCreateRequest(sandbox_id=id, sandboxer="shim")),
        (f"{CONTROLLER}/Start", pb.ControllerStartRequest(sandbox_id=id, sandboxer="shim")),
    ):
        assert await mine.refused(method, request) == "INVALID_ARGUMENT", method
    assert (await refusal(channel, f"{STORE}/List", pb.StoreListRequest()))[0] == "FAILED_PRECONDITION"


async def test_what_a_sandbox_refers_to_is_not_garbage(node: TestNode, channel: grpc.aio.Channel) -> None:
    connection = await connect(node.natsd.address, name="test")
    try:
        client = Client(connection, node.name, "holding")
        digests = []
        for data in (b"held by a sandbox", b"held by nobody"):
            request = content.WriteIngest(ref=digest_of(data), data=data, commit=True)
            written = (await client.call(content.INGEST_WRITE, request)).committed
            assert written is not None
            digests.append(written)
        mine = Namespace(channel, "holding")
        await mine.create("pod", **{"containerd.io/gc.ref.content.config": digests[0]})
        await client.call(content.NODE_GC, content.Collect())
        assert [one.digest for one in await client.collect(content.BLOB_LIST, content.ListBlobs())] == digests[:1]
        await mine.ask(f"{STORE}/Delete", pb.StoreDeleteRequest(sandbox_id="pod"))
        await client.call(content.NODE_GC, content.Collect())
        assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []
    finally:
        await connection.close()


async def test_a_namespace_with_a_sandbox_is_not_empty(channel: grpc.aio.Channel) -> None:
    from shoal_gateway.proto.containerd.services.namespaces.v1 import namespace_pb2 as namespaces

    mine, service = Namespace(channel, "inhabited"), "/containerd.services.namespaces.v1.Namespaces"
    await rpc(
        channel,
        f"{service}/Create",
        namespaces.CreateNamespaceRequest(namespace=namespaces.Namespace(name="inhabited")),
    )
    await mine.create("pod")
    request = namespaces.DeleteNamespaceRequest(name="inhabited")
    code, message = await refusal(channel, f"{service}/Delete", request)
    assert code == "FAILED_PRECONDITION"
    assert "sandboxes" in message
    await mine.ask(f"{STORE}/Delete", pb.StoreDeleteRequest(sandbox_id="pod"))
    await rpc(channel, f"{service}/Delete", request)


async def test_a_controller_that_is_not_there_is_not_found(channel: grpc.aio.Channel) -> None:
    mine = Namespace(channel, "default")
    asked = pb.ControllerCreateRequest(sandbox_id="pod", sandboxer="firecracker")
    assert await mine.refused(f"{CONTROLLER}/Create", asked) == "NOT_FOUND"
    for method, request in (
        ("Start", pb.ControllerStartRequest(sandbox_id="none", sandboxer="shim")),
        ("Wait", pb.ControllerWaitRequest(sandbox_id="none", sandboxer="shim")),
        ("Platform", pb.ControllerPlatformRequest(sandbox_id="none", sandboxer="shim")),
        ("Shutdown", pb.ControllerShutdownRequest(sandbox_id="none", sandboxer="shim")),
    ):
        assert await mine.refused(f"{CONTROLLER}/{method}", request) == "NOT_FOUND", method
    await mine.ask(f"{CONTROLLER}/Stop", pb.ControllerStopRequest(sandbox_id="none", sandboxer="shim"))
    status = await mine.ask(
        f"{CONTROLLER}/Status", pb.ControllerStatusRequest(sandbox_id="none", sandboxer="podsandbox")
    )
    assert (status.state, status.exited_at.seconds > 0) == ("", True)
    metrics = pb.ControllerMetricsRequest(sandbox_id="none", sandboxer="shim")
    assert await mine.refused(f"{CONTROLLER}/Metrics", metrics) == "UNIMPLEMENTED"


@pytest.fixture
async def running(natsd: NatsServer, tmp_path: Path) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd, others=("gateway",)) as made:
        yield made


async def member(node: RuntimeNode, id: str, sandbox: str, *args: str) -> None:
    """A running container of a sandbox."""
    spec = node.spec([*args]) | {"annotations": {"io.kubernetes.cri.sandbox-id": sandbox}}
    await node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id=id, spec=spec))
    await node.client.call(api.TASK_CREATE, api.CreateTask(container_id=id, rootfs=bundles.bind(node.rootfs)))
    await node.start(id)


async def test_a_sandbox_runs_until_it_is_stopped_and_its_containers_with_it(running: RuntimeNode) -> None:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(running.node)}") as channel:
        mine = Namespace(channel, running.namespace)
        netns = "/run/netns/pod"
        asked = pb.ControllerCreateRequest(
            sandbox_id="pod", sandboxer="shim", netns_path=netns, annotations={"owner": "test"}
        )
        await mine.ask(f"{CONTROLLER}/Create", asked)
        assert await mine.refused(f"{CONTROLLER}/Create", asked) == "ALREADY_EXISTS"
        start = pb.ControllerStartRequest(sandbox_id="pod", sandboxer="shim")
        started = await mine.ask(f"{CONTROLLER}/Start", start)
        assert started.sandbox_id == "pod"
        assert await mine.refused(f"{CONTROLLER}/Start", start) == "FAILED_PRECONDITION"
        platform = await mine.ask(
            f"{CONTROLLER}/Platform", pb.ControllerPlatformRequest(sandbox_id="pod", sandboxer="shim")
        )
        assert platform.platform.os == "linux"
        await member(running, "stubborn", "pod", "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
        await member(running, "willing", "pod", "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
        await running.run("apart", "sleep", "600")
        asked_status = pb.ControllerStatusRequest(sandbox_id="pod", sandboxer="shim", verbose=True)
        status = await mine.ask(f"{CONTROLLER}/Status", asked_status)
        assert (status.state, dict(status.info)) == (
            "SANDBOX_READY",
            {"netns_path": netns, "annotations.owner": "test"},
        )
        wait = pb.ControllerWaitRequest(sandbox_id="pod", sandboxer="shim")
        waiting = asyncio.ensure_future(mine.ask(f"{CONTROLLER}/Wait", wait))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await mine.create("pod")
        stop = pb.ControllerStopRequest(sandbox_id="pod", sandboxer="shim", timeout_secs=3)
        stopping = asyncio.ensure_future(mine.ask(f"{CONTROLLER}/Stop", stop))
        await asyncio.sleep(0.3)
        await mine.update(Sandbox(sandbox_id="pod", labels={"a": "b"}), "labels.a")  # what is stored is another matter
        assert not stopping.done()
        await stopping
        exits = {id: (await running.wait(id)).exit_status for id in ("stubborn", "willing")}
        assert exits == {"stubborn": 137, "willing": 3}
        ended = await waiting
        assert (ended.exit_status, ended.exited_at.seconds > 0) == (0, True)
        status = await mine.ask(f"{CONTROLLER}/Status", asked_status)
        assert (status.state, status.exited_at) == ("SANDBOX_NOTREADY", ended.exited_at)
        apart = await running.client.call(api.TASK_GET, api.ProcessRequest(container_id="apart"))
        assert apart.status == "running"
        await mine.ask(f"{CONTROLLER}/Stop", pb.ControllerStopRequest(sandbox_id="pod", sandboxer="shim"))
        await mine.ask(f"{CONTROLLER}/Shutdown", pb.ControllerShutdownRequest(sandbox_id="pod", sandboxer="shim"))
        assert await mine.refused(f"{CONTROLLER}/Wait", wait) == "NOT_FOUND"
        told = [e.topic for e in running.events if e.topic.startswith("/sandboxes/")]
        assert told == ["/sandboxes/create", "/sandboxes/start", "/sandboxes/exit"]


async def test_a_sandbox_outlives_the_service_and_shutdown_ends_what_runs(running: RuntimeNode) -> None:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(running.node)}") as channel:
        mine = Namespace(channel, running.namespace)
        await mine.ask(f"{CONTROLLER}/Create", pb.ControllerCreateRequest(sandbox_id="pod", sandboxer="podsandbox"))
        await mine.ask(f"{CONTROLLER}/Start", pb.ControllerStartRequest(sandbox_id="pod", sandboxer="podsandbox"))
        await member(running, "c", "pod", "sleep", "600")
        wait = pb.ControllerWaitRequest(sandbox_id="pod", sandboxer="podsandbox")
        waiting = asyncio.ensure_future(mine.ask(f"{CONTROLLER}/Wait", wait))
        await asyncio.to_thread(running.copy().kill)
        await asyncio.to_thread(running.copy().start)
        status = await mine.ask(
            f"{CONTROLLER}/Status", pb.ControllerStatusRequest(sandbox_id="pod", sandboxer="podsandbox")
        )
        assert status.state == "SANDBOX_READY"
        await mine.ask(f"{CONTROLLER}/Shutdown", pb.ControllerShutdownRequest(sandbox_id="pod", sandboxer="podsandbox"))
        assert (await running.wait("c")).exit_status == 137
        assert (await waiting).exited_at.seconds > 0
