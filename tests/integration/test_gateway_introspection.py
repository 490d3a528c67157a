"""What a whole node tells of its parts: every service it serves, its snapshotters, and its OCI runtimes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyProto
from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import Options
from shoal_gateway.proto.containerd.services.introspection.v1 import introspection_pb2 as pb
from shoal_gateway.proto.containerd.types.introspection_pb2 import RuntimeInfo, RuntimeRequest

from tests.support.gateway import ctr, lines_of, refusal, rpc, socket_of
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

INTROSPECTION = "/containerd.services.introspection.v1.Introspection"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("n")
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("content", "snapshot", "runtime", "gateway")
        made.start("external", module="tests.support.external_snapshotter")
        yield made


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as opened:
        yield opened


async def plugins(channel: grpc.aio.Channel, *filters: str) -> list[pb.Plugin]:
    request = pb.PluginsRequest(filters=filters)
    reply = await rpc(channel, f"{INTROSPECTION}/Plugins", request, reply=pb.PluginsResponse)
    return list(reply.plugins)


async def info(channel: grpc.aio.Channel, request: RuntimeRequest) -> RuntimeInfo:
    asked = pb.PluginInfoRequest(type="io.containerd.runtime.v2", id="task")
    asked.options.type_url, asked.options.value = RuntimeRequest.DESCRIPTOR.full_name, request.SerializeToString()
    reply = await rpc(channel, f"{INTROSPECTION}/PluginInfo", asked, reply=pb.PluginInfoResponse)
    assert reply.extra.type_url == "containerd.types.RuntimeInfo"
    return RuntimeInfo.FromString(reply.extra.value)


async def test_every_service_that_is_served_is_a_plugin(node: TestNode, channel: grpc.aio.Channel) -> None:
    words = {"sandbox": {"sandboxes", "sandbox-controllers"}}
    line = next(one for one in node.of("gateway").log.read_text().splitlines() if '"gateway.serving"' in one)
    served = [name.split(".")[2] for name in json.loads(line)["services"] if name.startswith("containerd.services.")]
    told = {one.id for one in await plugins(channel, "type==io.containerd.grpc.v1")}
    for name in served:
        assert words.get(name, {name}) <= told, name
    assert "healthcheck" in told


async def test_a_whole_node_has_no_plugin_with_an_error(node: TestNode, channel: grpc.aio.Channel) -> None:
    every = await plugins(channel)
    assert [one.id for one in every if one.HasField("init_err")] == []
    kinds = {(one.type.removeprefix("io.containerd."), one.id) for one in every}
    assert kinds >= {
        ("content.v1", "content"), ("metadata.v1", "bolt"), ("gc.v1", "scheduler"), ("lease.v1", "manager"),
        ("differ.v1", "walking"), ("runtime.v2", "task"), ("event.v1", "exchange"), ("internal.v1", "restart"),
        ("sandbox.store.v1", "local"), ("sandbox.controller.v1", "shim"), ("mount-manager.v1", "bolt"),
    }  # fmt: skip
    exports = {one.type: dict(one.exports) for one in every}
    assert exports["io.containerd.content.v1"] == {"root": str(node.root / "content")}
    assert exports["io.containerd.metadata.v1"]["policy"] == "isolated"
    shown = ctr(socket_of(node), "plugins", "ls")
    assert [line for line in shown.stdout.splitlines()[1:] if line.split()[-1] != "ok"] == []
    assert lines_of(shown.stdout, "io.containerd.differ.v1", "walking", "linux/")


async def test_snapshotters_are_those_that_work_here(node: TestNode, channel: grpc.aio.Channel) -> None:
    found = {one.id: one for one in await plugins(channel, "type==io.containerd.snapshotter.v1")}
    assert {"overlayfs", "native", "external"} <= set(found)  # the last one is a process of its own
    overlayfs = found["overlayfs"]
    assert overlayfs.exports["root"].startswith(str(node.root))
    assert [one.os for one in overlayfs.platforms] == ["linux"]
    assert "parallel" in overlayfs.capabilities


async def test_a_snapshotter_that_comes_is_there_at_once_and_one_that_goes_is_not_waited_for(
    node: TestNode, channel: grpc.aio.Channel
) -> None:
    async def told() -> set[str]:
        return {one.id for one in await plugins(channel, "type==io.containerd.snapshotter.v1")}

    external = node.of("external")
    assert "external" in await told()
    for _ in range(3):
        external.kill()
        killed = time.monotonic()
        while "external" in await told():
            assert time.monotonic() - killed < 5  # it may be told for a second more
        external.start()
        assert "external" in await told()
    external.kill()
    await asyncio.sleep(1.1)
    await told()
    began = time.monotonic()
    for _ in range(10):
        assert "external" not in await told()
    assert time.monotonic() - began < 5  # ten of those that were awaited would take a second each
    external.start()


async def test_the_runtime_tells_what_it_can_do(channel: grpc.aio.Channel) -> None:
    options = AnyProto(type_url="containerd.runc.v1.Options", value=Options(systemd_cgroup=True).SerializeToString())
    told = await info(channel, RuntimeRequest(runtime_path="io.containerd.runc.v2", options=options))
    assert (told.name, told.version.revision, told.options) == ("io.containerd.runc.v2", "shoal", options)
    assert told.version.version.startswith("v0.")
    assert told.features.type_url == "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    said = subprocess.run(["runc", "features"], capture_output=True, check=True).stdout
    assert json.loads(told.features.value) == json.loads(said)
    assert (await info(channel, RuntimeRequest())).features == told.features


async def test_another_runtime_by_its_binary(channel: grpc.aio.Channel) -> None:
    value = Options(binary_name="crun").SerializeToString()
    options = AnyProto(type_url="type.googleapis.com/containerd.runc.v1.Options", value=value)
    told = await info(channel, RuntimeRequest(runtime_path="io.containerd.runc.v2", options=options))
    assert told.annotations["shoal/oci-runtime"] == "crun"
    assert told.annotations["shoal/oci-runtime.version"].startswith("crun version")


async def test_what_can_not_be_told_of_a_runtime_has_its_code(channel: grpc.aio.Channel) -> None:
    async def refused(type_url: str, request: RuntimeRequest | bytes) -> str:
        value = request if isinstance(request, bytes) else request.SerializeToString()
        asked = pb.PluginInfoRequest(type="io.containerd.runtime.v2", id="task")
        asked.options.type_url, asked.options.value = type_url, value
        return (await refusal(channel, f"{INTROSPECTION}/PluginInfo", asked))[0]

    name = RuntimeRequest.DESCRIPTOR.full_name
    assert await refused(name, RuntimeRequest(runtime_path="no-such-runtime")) == "FAILED_PRECONDITION"
    assert await refused(name, RuntimeRequest(runtime_path="/bin/false")) == "FAILED_PRECONDITION"
    assert await refused(name, b"\xff\xff") == "INVALID_ARGUMENT"
    assert await refused("example.com/other", RuntimeRequest()) == "UNIMPLEMENTED"
    odd = RuntimeRequest(options=AnyProto(type_url="example.com/other", value=b"x"))
    assert await refused(name, odd) == "INVALID_ARGUMENT"
