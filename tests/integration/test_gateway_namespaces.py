"""Namespaces through the gateway, and the same commands against Debian's containerd."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from shoal_gateway.proto.containerd.events.namespace_pb2 import NamespaceCreate
from shoal_gateway.proto.containerd.services.events.v1.events_pb2 import SubscribeRequest
from shoal_gateway.proto.containerd.services.leases.v1 import leases_pb2
from shoal_gateway.proto.containerd.services.namespaces.v1 import namespace_pb2 as pb
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope

from tests.support.gateway import ctr, lines_of, refusal, rpc, socket_of, until
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

NAMESPACES = "/containerd.services.namespaces.v1.Namespaces"
LEASES = "/containerd.services.leases.v1.Leases"
SINCE_1_7 = {"mounts", "sandbox-controllers", "sandboxes", "streaming", "transfer"}
"""Plugins that Debian's containerd, 1.6, hasn't got."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("n")
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("content", "gateway")
        yield made


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of Debian's containerd, on directories of its own."""
    directory = tmp_path_factory.mktemp("c")
    config, address = directory / "config.toml", directory / "c.sock"
    config.write_text(
        'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
    )
    command = ["containerd", "--config", config, "--address", address]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--root", directory / "root", "--state", directory / "state"], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 30
        while ctr(address, "version").returncode != 0:
            assert time.monotonic() < deadline, (directory / "log").read_text()[-2000:]
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as opened:
        yield opened


async def labels_of(channel: grpc.aio.Channel, name: str) -> dict[str, str]:
    reply = await rpc(channel, f"{NAMESPACES}/Get", pb.GetNamespaceRequest(name=name), reply=pb.GetNamespaceResponse)
    return dict(reply.namespace.labels)


async def names(channel: grpc.aio.Channel, filter: str = "") -> list[str]:
    request = pb.ListNamespacesRequest(filter=filter)
    reply = await rpc(channel, f"{NAMESPACES}/List", request, reply=pb.ListNamespacesResponse)
    return [namespace.name for namespace in reply.namespaces]


async def create(channel: grpc.aio.Channel, name: str, **labels: str) -> None:
    request = pb.CreateNamespaceRequest(namespace=pb.Namespace(name=name, labels=labels))
    reply = await rpc(channel, f"{NAMESPACES}/Create", request, reply=pb.CreateNamespaceResponse)
    assert (reply.namespace.name, dict(reply.namespace.labels)) == (name, labels)


SESSION = [
    ("namespaces", "create", "parity-a", "team=blue"),
    ("namespaces", "create", "parity-b"),
    ("namespaces", "ls"),
    ("namespaces", "ls", "-q"),
    ("namespaces", "create", "parity-a"),
    ("namespaces", "create", "a..b"),
    ("namespaces", "label", "parity-a", "team=", "stage=test", "zone=1"),
    ("namespaces", "ls"),
    ("namespaces", "label", "parity-new", "made=by-label"),
    ("namespaces", "ls"),
    ("namespaces", "rm", "parity-new"),
    ("namespaces", "rm", "parity-nothing"),
    ("namespaces", "rm", "parity-a", "parity-b"),
    ("namespaces", "ls"),
]


def test_ctr_namespaces_prints_what_it_prints_against_containerd(node: TestNode, containerd: Path) -> None:
    for command in SESSION:
        theirs, ours = ctr(containerd, *command), ctr(socket_of(node), *command)
        assert (ours.stdout, ours.returncode) == (theirs.stdout, theirs.returncode), (command, ours.stderr)
        assert bool(ours.stderr) == bool(theirs.stderr), (command, ours.stderr, theirs.stderr)
        for word in ("already exists", "invalid argument", "not found"):
            assert (word in ours.stderr) == (word in theirs.stderr), (command, ours.stderr, theirs.stderr)


def test_ctr_version_and_plugins_have_the_shape_they_have_with_containerd(node: TestNode, containerd: Path) -> None:
    def shape(socket: Path) -> list[str]:
        lines = ctr(socket, "version").stdout.splitlines()
        return [line.partition(":")[0] for line in lines]

    assert shape(socket_of(node)) == shape(containerd)
    theirs = {tuple(line.split()[:3]) for line in ctr(containerd, "plugins", "ls").stdout.splitlines()}
    ours = {tuple(line.split()[:3]) for line in ctr(socket_of(node), "plugins", "ls").stdout.splitlines()}
    kinds = {kind for kind, *_ in theirs}
    of_its_time = {one for one in ours if one[0] in kinds and one[1] not in SINCE_1_7}
    assert of_its_time <= theirs
    assert len(of_its_time) > 15


def test_the_plugins_of_services_that_answer_are_ok(node: TestNode) -> None:
    shown = ctr(socket_of(node), "plugins", "ls").stdout
    assert lines_of(shown, "io.containerd.content.v1 ", " content ")[0].split()[-1] == "ok"
    assert lines_of(shown, "io.containerd.grpc.v1 ", " namespaces ")[0].split()[-1] == "ok"


@pytest.mark.parametrize("command", [("version",), ("plugins", "ls", "id=="), ("namespaces", "create", "a..b")])
def test_ctr_ends_with_the_status_it_has_with_containerd(
    node: TestNode, containerd: Path, command: tuple[str, ...]
) -> None:
    assert ctr(socket_of(node), *command).returncode == ctr(containerd, *command).returncode


async def test_creating_twice_already_exists(channel: grpc.aio.Channel) -> None:
    await create(channel, "twice")
    request = pb.CreateNamespaceRequest(namespace=pb.Namespace(name="twice"))
    code, message = await refusal(channel, f"{NAMESPACES}/Create", request)
    assert code == "ALREADY_EXISTS"
    assert "twice" in message


async def test_deleting_what_isnt_there_is_not_found(channel: grpc.aio.Channel) -> None:
    code, _ = await refusal(channel, f"{NAMESPACES}/Delete", pb.DeleteNamespaceRequest(name="nothing"))
    assert code == "NOT_FOUND"


async def test_a_namespace_that_isnt_there_has_no_labels(channel: grpc.aio.Channel) -> None:
    assert await labels_of(channel, "nothing") == {}


async def test_a_mask_changes_the_labels_it_names_and_no_others(channel: grpc.aio.Channel) -> None:
    await create(channel, "masked", a="1", b="2", c="3")
    request = pb.UpdateNamespaceRequest(namespace=pb.Namespace(name="masked", labels={"a": "9", "b": "", "d": "no"}))
    request.update_mask.paths.extend(["labels.a", "labels.b"])
    await rpc(channel, f"{NAMESPACES}/Update", request)
    assert await labels_of(channel, "masked") == {"a": "9", "c": "3"}


async def test_without_a_mask_all_labels_are_replaced(channel: grpc.aio.Channel) -> None:
    await create(channel, "replaced", a="1", b="2")
    request = pb.UpdateNamespaceRequest(namespace=pb.Namespace(name="replaced", labels={"c": "3"}))
    await rpc(channel, f"{NAMESPACES}/Update", request)
    assert await labels_of(channel, "replaced") == {"c": "3"}


async def test_lists_are_filtered(channel: grpc.aio.Channel) -> None:
    await create(channel, "red-1", colour="red")
    await create(channel, "blue-1", colour="blue")
    assert await names(channel, "labels.colour==red") == ["red-1"]
    assert await names(channel, "name==blue-1") == ["blue-1"]
    assert {"red-1", "blue-1"} <= set(await names(channel))
    code, _ = await refusal(channel, f"{NAMESPACES}/List", pb.ListNamespacesRequest(filter="name=="))
    assert code == "INVALID_ARGUMENT"


async def test_a_thousand_namespaces_are_listed(channel: grpc.aio.Channel) -> None:
    async def some(first: int) -> None:
        for number in range(first, first + 50):
            await create(channel, f"many-{number}", padding="x" * 1000)

    await asyncio.gather(*(some(first) for first in range(0, 1000, 50)))
    assert len([name for name in await names(channel) if name.startswith("many-")]) == 1000


async def test_what_happens_to_a_namespace_is_an_event_in_it(node: TestNode, channel: grpc.aio.Channel) -> None:
    stream = channel.unary_stream(
        "/containerd.services.events.v1.Events/Subscribe",
        request_serializer=SubscribeRequest.SerializeToString,
        response_deserializer=Envelope.FromString,
    )(SubscribeRequest(filters=["namespace==told"]))
    log = node.of("gateway").log
    await until(lambda: "events.subscribed" in log.read_text())
    await create(channel, "told", a="b")
    await rpc(channel, f"{NAMESPACES}/Delete", pb.DeleteNamespaceRequest(name="told"))
    async with asyncio.timeout(20):
        created, deleted = await stream.read(), await stream.read()
    assert (created.topic, deleted.topic) == ("/namespaces/create", "/namespaces/delete")
    payload = NamespaceCreate.FromString(created.event.value)
    assert (payload.name, dict(payload.labels)) == ("told", {"a": "b"})


async def test_content_killed_and_started_again_is_no_error(node: TestNode, channel: grpc.aio.Channel) -> None:
    content = node.of("content")
    content.kill()
    asked = asyncio.create_task(names(channel))
    await asyncio.to_thread(content.start)
    assert isinstance(await asked, list)


async def test_200_clients_half_of_them_killed_leave_nothing(node: TestNode) -> None:
    pid = node.of("gateway").pid

    def fds() -> int:
        return psutil.Process(pid).num_fds()

    async def client(number: int) -> None:
        process = await asyncio.create_subprocess_exec(
            "ctr", "--address", str(socket_of(node)), "namespaces", "ls", "-q",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        if number % 2:
            await asyncio.sleep(0.005 * (number % 7))
            if process.returncode is None:
                process.kill()
        status = await process.wait()
        assert number % 2 or status == 0

    async def wave() -> None:
        for first in range(0, 200, 40):
            await asyncio.gather(*(client(first + number) for number in range(40)))

    settled = fds()
    await wave()
    await until(lambda: fds() <= settled + 1)
    assert "Traceback" not in node.of("gateway").log.read_text()


async def test_of_several_namespaces_the_first_counts(channel: grpc.aio.Channel) -> None:
    """A client that names a namespace within another one, as Go's contexts nest, sends both, the inner one first."""
    nested = (("containerd-namespace", "inner"), ("containerd-namespace", "outer"))
    create = leases_pb2.CreateRequest(id="nested")
    await rpc(channel, f"{LEASES}/Create", create, metadata=nested)
    for name, ids in (("inner", ["nested"]), ("outer", [])):
        reply = await rpc(
            channel, f"{LEASES}/List", leases_pb2.ListRequest(), reply=leases_pb2.ListResponse,
            metadata=(("containerd-namespace", name),),
        )  # fmt: skip
        assert [lease.id for lease in reply.leases] == ids
    await rpc(channel, f"{LEASES}/Delete", leases_pb2.DeleteRequest(id="nested"), metadata=nested)
