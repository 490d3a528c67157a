"""containerd's clients against the gateway: Version, Introspection, health, reflection, and what is refused."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from shoal_bus.api import gateway as api
from shoal_bus.client import Client
from shoal_gateway.proto.containerd.services.events.v1 import events_pb2
from shoal_gateway.proto.containerd.services.introspection.v1 import introspection_pb2 as introspection
from shoal_gateway.proto.containerd.services.namespaces.v1 import namespace_pb2 as namespaces
from shoal_gateway.proto.containerd.services.version.v1.version_pb2 import VersionResponse

from tests.support.gateway import ctr, lines_of, refusal, rpc, socket_of
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

VERSION = "/containerd.services.version.v1.Version/Version"
PLUGINS = "/containerd.services.introspection.v1.Introspection/Plugins"
PLUGIN_INFO = "/containerd.services.introspection.v1.Introspection/PluginInfo"
SERVER = "/containerd.services.introspection.v1.Introspection/Server"
NAMESPACES = "/containerd.services.namespaces.v1.Namespaces"
EVENTS = "/containerd.services.events.v1.Events"
HEALTH = "/grpc.health.v1.Health"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    """A bus with a gateway, and no other service."""
    directory = tmp_path_factory.mktemp("n")
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("gateway")
        yield made


@pytest.fixture
def socket(node: TestNode) -> Path:
    return socket_of(node)


@pytest.fixture
async def channel(socket: Path) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket}") as opened:
        yield opened


# ------------------------------------------------------------------------------------------------ what is answered


def test_ctr_version_shows_shoals_own(socket: Path) -> None:
    shown = ctr(socket, "version")
    assert shown.returncode == 0, shown.stderr
    server = shown.stdout.partition("Server:")[2]
    assert lines_of(server, "Version:", "v0.1.0")
    assert lines_of(server, "Revision:", "shoal")
    assert lines_of(server, "UUID:")


def test_ctr_plugins_ls_shows_that_no_service_answers(socket: Path) -> None:
    shown = ctr(socket, "plugins", "ls")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split()[:4] == ["TYPE", "ID", "PLATFORMS", "STATUS"]
    assert lines_of(shown.stdout, "io.containerd.grpc.v1 ", " version ")[0].split()[-1] == "ok"
    assert lines_of(shown.stdout, "io.containerd.snapshotter.v1 ", " overlayfs ", " linux/")[0].split()[-1] == "error"
    assert lines_of(shown.stdout, "io.containerd.content.v1 ", " content ")[0].split()[-1] == "error"


def test_ctr_plugins_ls_in_detail_says_why(socket: Path) -> None:
    shown = ctr(socket, "plugins", "ls", "-d", "id==overlayfs")
    assert shown.returncode == 0, shown.stderr
    assert lines_of(shown.stdout, "Type:") == ["Type:          io.containerd.snapshotter.v1"]
    assert lines_of(shown.stdout, "Code:", "Unavailable")
    assert lines_of(shown.stdout, "Message:", "snapshot service doesn't answer")


async def test_plugins_are_filtered_by_type_and_id(channel: grpc.aio.Channel) -> None:
    async def found(*filters: str) -> list[str]:
        request = introspection.PluginsRequest(filters=filters)
        reply = await rpc(channel, PLUGINS, request, reply=introspection.PluginsResponse)
        return [plugin.id for plugin in reply.plugins]

    assert await found("type==io.containerd.snapshotter.v1") == ["overlayfs"]
    assert await found("id==version", "id==task") == ["version", "task"]
    assert await found("type==io.containerd.grpc.v1,id~=^ver") == ["version"]
    assert await found("id==nothing") == []
    assert len(await found()) > 5


async def test_restart_policies_are_announced_as_nerdctl_asks_for_them(channel: grpc.aio.Channel) -> None:
    request = introspection.PluginsRequest(filters=["id==restart"])
    reply = await rpc(channel, PLUGINS, request, reply=introspection.PluginsResponse)
    (plugin,) = reply.plugins
    assert list(plugin.capabilities) == ["no", "always", "unless-stopped", "on-failure"]


async def test_plugin_info_names_one_plugin(channel: grpc.aio.Channel) -> None:
    request = introspection.PluginInfoRequest(type="io.containerd.grpc.v1", id="version")
    reply = await rpc(channel, PLUGIN_INFO, request, reply=introspection.PluginInfoResponse)
    assert (reply.plugin.type, reply.plugin.id) == (request.type, request.id)
    request.options.CopyFrom(AnyMessage(type_url="x"))
    assert (await refusal(channel, PLUGIN_INFO, request))[0] == "UNIMPLEMENTED"
    request.type, request.id = "io.containerd.snapshotter.v1", "overlayfs"
    assert (await refusal(channel, PLUGIN_INFO, request))[0] == "FAILED_PRECONDITION"
    request.id = "nothing"
    assert (await refusal(channel, PLUGIN_INFO, request))[0] == "NOT_FOUND"


async def test_server_tells_the_process_and_a_uuid_that_stays(node: TestNode, channel: grpc.aio.Channel) -> None:
    told = await rpc(channel, SERVER, Empty(), reply=introspection.ServerResponse)
    assert told.pid == node.of("gateway").pid
    assert told.pidns == os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116
    [copy] = node.start("gateway", arguments=("--address", str(node.state / "second.sock")))
    async with grpc.aio.insecure_channel(f"unix:{node.state / 'second.sock'}") as other:
        assert (await rpc(other, SERVER, Empty(), reply=introspection.ServerResponse)).uuid == told.uuid
    assert copy.stop() == 0
    assert not (node.state / "second.sock").exists()


async def test_the_server_and_each_of_its_services_are_healthy(channel: grpc.aio.Channel) -> None:
    for name in ("", "containerd.services.version.v1.Version"):
        request = HealthCheckRequest(service=name)
        reply = await rpc(channel, f"{HEALTH}/Check", request, reply=HealthCheckResponse)
        assert reply.status == HealthCheckResponse.SERVING
    request = HealthCheckRequest(service="containerd.services.nothing.v1.Nothing")
    assert (await refusal(channel, f"{HEALTH}/Check", request))[0] == "NOT_FOUND"


async def test_reflection_names_every_service(channel: grpc.aio.Channel) -> None:
    async for reply in ServerReflectionStub(channel).ServerReflectionInfo(
        iter([ServerReflectionRequest(list_services="")])
    ):
        names = {service.name for service in reply.list_services_response.service}
        break
    assert names >= {"containerd.services.events.v1.Events", "grpc.health.v1.Health"}


def test_the_socket_is_roots_with_mode_0660(socket: Path) -> None:
    status = socket.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o660, 0, 0)


async def test_the_gateway_tells_of_itself_on_the_bus(node: TestNode) -> None:
    async with Client.open(node.natsd.address, node.name) as client:
        told = await client.call(api.NODE_INFO, api.NodeInfoRequest())
    assert told.pid == node.of("gateway").pid
    assert (told.address, told.root) == (str(socket_of(node)), str(node.root))


# ------------------------------------------------------------------------------------------------- what is refused


async def test_a_service_that_is_down_is_unavailable_soon(channel: grpc.aio.Channel, socket: Path) -> None:
    code, message = await refusal(channel, f"{NAMESPACES}/List", namespaces.ListNamespacesRequest(), timeout=10)
    assert code == "UNAVAILABLE"
    assert "content service" in message
    shown = ctr(socket, "namespaces", "ls", timeout=10)
    assert shown.returncode == 1
    assert "unavailable" in shown.stderr


async def test_a_clients_deadline_is_kept(channel: grpc.aio.Channel) -> None:
    code, _ = await refusal(channel, f"{NAMESPACES}/List", namespaces.ListNamespacesRequest(), timeout=0.5)
    assert code == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("method", [PLUGINS, f"{NAMESPACES}/Get", f"{NAMESPACES}/Create", f"{NAMESPACES}/Update"])
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\xff\x01x", b"\x0a\x02\xff\xfe", b"\x00"])
async def test_what_is_no_protobuf_is_refused_as_containerd_does(
    channel: grpc.aio.Channel, method: str, data: bytes
) -> None:
    code, message = await refusal(channel, method, data)
    assert code == "INTERNAL"
    assert message.startswith("grpc: error unmarshalling request")


async def test_a_request_larger_than_containerd_takes_is_refused(channel: grpc.aio.Channel) -> None:
    code, _ = await refusal(channel, f"{NAMESPACES}/Get", b"\x0a\x80\x80\x80\x08" + bytes(16 << 20))
    assert code == "RESOURCE_EXHAUSTED"
    assert await rpc(channel, VERSION, Empty(), reply=VersionResponse)


@pytest.mark.parametrize("text", ["id==", "==x", "id~~x", "id~=/(", 'id=="x', "id==a,", "id~=(", "\x00", "x" * 5000])
async def test_bad_filters_are_invalid_arguments(channel: grpc.aio.Channel, text: str) -> None:
    code, _ = await refusal(channel, PLUGINS, introspection.PluginsRequest(filters=[text]))
    assert code == "INVALID_ARGUMENT"
    stream = channel.unary_stream(f"{EVENTS}/Subscribe")(
        events_pb2.SubscribeRequest(filters=[text]).SerializeToString(), timeout=10
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stream.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["", "a..b", "../x", "-a", "a/b", "x" * 77, "ä", "_", "*", ">"])
async def test_names_that_cant_be_a_namespaces_are_invalid_arguments(channel: grpc.aio.Channel, name: str) -> None:
    created = namespaces.CreateNamespaceRequest(namespace=namespaces.Namespace(name=name))
    assert (await refusal(channel, f"{NAMESPACES}/Create", created))[0] == "INVALID_ARGUMENT"
    deleted = namespaces.DeleteNamespaceRequest(name=name)
    assert (await refusal(channel, f"{NAMESPACES}/Delete", deleted))[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("path", ["name", "labels", "labels.", "Labels.x", "nothing"])
async def test_field_masks_name_labels_alone(channel: grpc.aio.Channel, path: str) -> None:
    request = namespaces.UpdateNamespaceRequest(namespace=namespaces.Namespace(name="a"))
    request.update_mask.paths.append(path)
    assert (await refusal(channel, f"{NAMESPACES}/Update", request))[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "method",
    [
        f"{EVENTS}/Nothing", f"{NAMESPACES}/Nothing",
        "/nothing/Nothing",
    ],
)  # fmt: skip
async def test_what_the_gateway_hasnt_got_is_unimplemented(channel: grpc.aio.Channel, method: str) -> None:
    assert (await refusal(channel, method, Empty()))[0] == "UNIMPLEMENTED"


def test_no_refusal_left_a_traceback_in_the_log(node: TestNode) -> None:
    log = node.of("gateway").log.read_text()
    assert "Traceback" not in log
    assert "call.failed" not in log
