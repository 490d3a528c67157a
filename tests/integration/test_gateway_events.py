"""Events over gRPC: live, in order, filtered, and nothing left of a client that goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import psutil
import pytest
from shoal_bus.api import content, runtime
from shoal_bus.connection import Connection
from shoal_gateway.proto.containerd.events.task_pb2 import TaskExit
from shoal_gateway.proto.containerd.services.events.v1.events_pb2 import SubscribeRequest
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope

from tests.support.gateway import Emitter, emitting, socket_of, until
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

SUBSCRIBE = "/containerd.services.events.v1.Events/Subscribe"
AT = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
Subscription = grpc.aio.UnaryStreamCall


@pytest.fixture
async def node(natsd: NatsServer, tmp_path: Path) -> AsyncIterator[TestNode]:
    with TestNode(tmp_path, natsd) as made:
        await asyncio.to_thread(made.start, "gateway")
        yield made


@pytest.fixture
async def emitter(node: TestNode, connection: Connection) -> AsyncIterator[Emitter]:
    """The runtime's outbox."""
    async with emitting(connection, node.directory / "emitter", node.name, "runtime") as made:
        yield made


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as opened:
        yield opened


@pytest.fixture
async def narrow(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    """A client that takes no more ahead of its reader than HTTP/2's first window of 64 KiB."""
    options = [("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}", options=options) as opened:
        yield opened


MANY = 3000
"""Events: more than flow control, the sockets and what the hub keeps for a subscriber hold between them."""


def emit_many(emitter: Emitter, count: int) -> None:
    updates = [runtime.ContainerUpdated(id=f"c-{number}", image="x" * 2000) for number in range(count)]
    emitter.emit("default", *[(runtime.CONTAINERS_UPDATE, update) for update in updates])


async def consumers(connection: Connection) -> int:
    """How many consumers read the stream of events."""
    return len(await connection.jetstream().consumers_info("SHOAL_EVENTS"))


async def no_consumer(connection: Connection) -> None:
    """Waits until nobody reads the stream: a gateway without subscribers doesn't either."""
    async with asyncio.timeout(20):
        while await consumers(connection):
            await asyncio.sleep(0.02)


def exit_of(container: str, status: int = 0) -> runtime.TaskExited:
    return runtime.TaskExited(container_id=container, id=container, pid=9, exit_status=status, exited_at=AT)


def subscribe(channel: grpc.aio.Channel, *filters: str) -> Subscription:
    return channel.unary_stream(
        SUBSCRIBE,
        request_serializer=SubscribeRequest.SerializeToString,
        response_deserializer=Envelope.FromString,
    )(SubscribeRequest(filters=filters))


async def take(stream: Subscription, count: int) -> list[Envelope]:
    async with asyncio.timeout(20):
        return [await stream.read() for _ in range(count)]


async def subscribed(node: TestNode, count: int = 1) -> None:
    """Waits until the gateway has so many subscribers: only from then on do they get everything."""
    log = node.of("gateway").log
    await until(lambda: log.read_text().count("events.subscribed") >= count)


async def test_ctr_events_prints_what_happens(node: TestNode, emitter: Emitter) -> None:
    process = await asyncio.create_subprocess_exec(
        "ctr", "--address", str(socket_of(node)), "events", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        await subscribed(node)
        created = runtime.ContainerCreated(id="web-1", image="busybox", runtime=runtime.ContainerRuntime(name="runc"))
        emitter.emit("default", (runtime.CONTAINERS_CREATE, created), (runtime.TASKS_EXIT, exit_of("web-1", 137)))
        async with asyncio.timeout(20):
            first, second = [(await process.stdout.readline()).decode() for _ in range(2)]
    finally:
        process.kill()
        await process.wait()
    assert " default /containers/create " in first
    assert json.loads(first.partition("/containers/create ")[2])["id"] == "web-1"
    assert " default /tasks/exit " in second
    payload = json.loads(second.partition("/tasks/exit ")[2])
    assert (payload["container_id"], payload["exit_status"]) == ("web-1", 137)


async def test_every_subscriber_gets_each_event_once_and_in_order(
    node: TestNode, emitter: Emitter, channel: grpc.aio.Channel
) -> None:
    streams = [subscribe(channel) for _ in range(20)]
    await subscribed(node, 20)
    for number in range(100):
        emitter.emit("default", (runtime.TASKS_EXIT, exit_of(f"c-{number}")))
    for stream in streams:
        envelopes = await take(stream, 100)
        ids = [TaskExit.FromString(one.event.value).container_id for one in envelopes]
        assert ids == [f"c-{number}" for number in range(100)]


async def test_filters_choose_by_topic_namespace_and_field(
    node: TestNode, emitter: Emitter, channel: grpc.aio.Channel
) -> None:
    by_topic = subscribe(channel, "topic==/tasks/exit")
    by_namespace = subscribe(channel, "namespace==tenant")
    by_field = subscribe(channel, "topic~=^/tasks/,event.container_id==b")
    either = subscribe(channel, "event.id==a,topic==/containers/delete", "namespace==tenant")
    await subscribed(node, 4)
    for namespace, name in (("default", "a"), ("tenant", "b")):
        emitter.emit(
            namespace,
            (runtime.TASKS_START, runtime.TaskStarted(container_id=name, pid=3)),
            (runtime.TASKS_EXIT, exit_of(name)),
            (runtime.CONTAINERS_DELETE, runtime.ContainerDeleted(id=name)),
        )
    assert [e.namespace for e in await take(by_topic, 2)] == ["default", "tenant"]
    assert [e.topic for e in await take(by_namespace, 3)] == ["/tasks/start", "/tasks/exit", "/containers/delete"]
    assert [e.topic for e in await take(by_field, 2)] == ["/tasks/start", "/tasks/exit"]
    told = [(e.namespace, e.topic) for e in await take(either, 4)]
    assert told[0] == ("default", "/containers/delete")
    assert {namespace for namespace, _ in told[1:]} == {"tenant"}


async def test_subscribing_begins_now(node: TestNode, emitter: Emitter, channel: grpc.aio.Channel) -> None:
    witness = subscribe(channel)
    await subscribed(node)
    emitter.emit("default", (runtime.TASKS_EXIT, exit_of("before")))
    await take(witness, 1)
    late = subscribe(channel)
    await subscribed(node, 2)
    emitter.emit("default", (runtime.TASKS_EXIT, exit_of("after")))
    [envelope] = await take(late, 1)
    assert TaskExit.FromString(envelope.event.value).container_id == "after"


async def test_a_subscriber_that_reads_nothing_for_long_misses_nothing(
    node: TestNode, emitter: Emitter, narrow: grpc.aio.Channel, channel: grpc.aio.Channel
) -> None:
    slow, quick = subscribe(narrow), subscribe(channel, "topic==/tasks/exit")
    await subscribed(node, 2)
    emit_many(emitter, MANY)
    emitter.emit("default", (runtime.TASKS_EXIT, exit_of("last")))
    await take(quick, 1)
    envelopes = await take(slow, MANY + 1)
    assert [e.topic for e in envelopes] == ["/containers/update"] * MANY + ["/tasks/exit"]
    assert "events.behind" in node.of("gateway").log.read_text()


async def test_events_go_on_after_the_bus_was_away(
    node: TestNode, natsd: NatsServer, emitter: Emitter, channel: grpc.aio.Channel
) -> None:
    stream = subscribe(channel)
    await subscribed(node)
    emitter.emit("default", (runtime.TASKS_EXIT, exit_of("first")))
    await take(stream, 1)
    await asyncio.to_thread(natsd.stop)
    emitter.emit("default", (runtime.TASKS_EXIT, exit_of("meanwhile")))
    await asyncio.to_thread(natsd.start)
    emitter.emit("default", (runtime.TASKS_EXIT, exit_of("afterwards")))
    ids = [TaskExit.FromString(one.event.value).container_id for one in await take(stream, 2)]
    assert ids == ["meanwhile", "afterwards"]


async def test_events_of_another_node_are_not_told(
    node: TestNode, emitter: Emitter, connection: Connection, channel: grpc.aio.Channel
) -> None:
    stream = subscribe(channel)
    await subscribed(node)
    async with emitting(connection, node.directory / "elsewhere", "elsewhere", "content") as other:
        other.emit("default", (content.IMAGES_CREATE, content.ImageEvent(name="theirs")))
        await asyncio.sleep(0.5)
    emitter.emit("default", (runtime.TASKS_EXIT, exit_of("ours")))
    [envelope] = await take(stream, 1)
    assert envelope.topic == "/tasks/exit"


async def test_clients_killed_in_the_middle_leave_nothing(
    node: TestNode, emitter: Emitter, connection: Connection
) -> None:
    gateway, log = psutil.Process(node.of("gateway").pid), node.of("gateway").log
    waves, clients = 3, 20

    async def wave(number: int) -> None:
        processes = [
            await asyncio.create_subprocess_exec(
                "ctr", "--address", str(socket_of(node)), "events", stdout=asyncio.subprocess.DEVNULL
            )
            for _ in range(clients)
        ]
        await subscribed(node, clients * number)
        emitter.emit("default", *[(runtime.TASKS_EXIT, exit_of(f"c-{n}")) for n in range(50)])
        for process in processes:
            process.kill()
            await process.wait()
        await until(lambda: log.read_text().count("events.unsubscribed") == clients * number)

    await wave(1)
    await asyncio.sleep(0.5)
    fds, threads = gateway.num_fds(), gateway.num_threads()
    for number in range(2, waves + 1):
        await wave(number)
    await until(lambda: gateway.num_fds() <= fds and gateway.num_threads() <= threads)
    await no_consumer(connection)
    assert "Traceback" not in log.read_text()


async def test_a_subscriber_that_was_behind_leaves_no_consumer(
    node: TestNode, emitter: Emitter, narrow: grpc.aio.Channel, channel: grpc.aio.Channel, connection: Connection
) -> None:
    slow, quick = subscribe(narrow), subscribe(channel, "topic==/tasks/exit")
    await subscribed(node, 2)
    emit_many(emitter, MANY)
    emitter.emit("default", (runtime.TASKS_EXIT, exit_of("last")))
    await take(quick, 1)
    await take(slow, MANY)
    assert await consumers(connection) == 2
    slow.cancel()
    async with asyncio.timeout(10):
        while await consumers(connection) > 1:
            await asyncio.sleep(0.05)


async def test_subscribers_share_a_consumer_that_is_there_as_long_as_they_are(
    node: TestNode, emitter: Emitter, channel: grpc.aio.Channel, connection: Connection
) -> None:
    for number in range(3):
        assert await consumers(connection) == 0
        streams = [subscribe(channel) for _ in range(3)]
        await subscribed(node, 3 * (number + 1))
        emitter.emit("default", (runtime.TASKS_EXIT, exit_of(f"c-{number}")))
        for stream in streams:
            [envelope] = await take(stream, 1)
            assert TaskExit.FromString(envelope.event.value).container_id == f"c-{number}"
        assert await consumers(connection) == 1
        for stream in streams:
            stream.cancel()
        await no_consumer(connection)


async def test_whoever_comes_while_others_go_misses_nothing(
    node: TestNode, emitter: Emitter, channel: grpc.aio.Channel
) -> None:
    """Each one subscribes in the moment in which the last of the others leaves, and sees what is told from then on."""
    log, told = node.of("gateway").log, 0
    stream = subscribe(channel)
    await subscribed(node)
    for number in range(30):
        expected = [f"c-{n}" for n in range(told, told + 5)]
        emitter.emit("default", *[(runtime.TASKS_EXIT, exit_of(name)) for name in expected])
        told += 5
        ids = [TaskExit.FromString(one.event.value).container_id for one in await take(stream, 5)]
        assert ids == expected
        stream.cancel()
        if number % 2:  # the reader is just being stopped, or about to be
            await until(lambda gone=number + 1: log.read_text().count("events.unsubscribed") == gone)
        stream = subscribe(channel)
        await subscribed(node, number + 2)
