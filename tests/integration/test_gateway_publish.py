"""Events that clients publish and forward: committed before the answer, and told byte for byte as they came."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp
from shoal_gateway.proto.containerd.events.task_pb2 import TaskExit
from shoal_gateway.proto.containerd.services.events.v1.events_pb2 import (
    ForwardRequest,
    PublishRequest,
    SubscribeRequest,
)
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope

from tests.support.gateway import refusal, rpc, socket_of, until
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

EVENTS = "/containerd.services.events.v1.Events"
IN_DEFAULT = (("containerd-namespace", "default"),)
OPAQUE = Any(type_url="example.com/tenant.v1.DiskFull", value=b"\x00\xffnot a message that anybody here knows")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("n")
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("runtime", "gateway")
        yield made


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as opened:
        yield opened


Subscription = grpc.aio.UnaryStreamCall


async def subscribe(node: TestNode, channel: grpc.aio.Channel, *filters: str) -> Subscription:
    """A subscription that holds."""
    log = node.of("gateway").log
    before = log.read_text().count("events.subscribed")
    stream = channel.unary_stream(
        f"{EVENTS}/Subscribe",
        request_serializer=SubscribeRequest.SerializeToString,
        response_deserializer=Envelope.FromString,
    )(SubscribeRequest(filters=filters))
    await until(lambda: log.read_text().count("events.subscribed") > before)
    return stream


async def take(stream: Subscription, count: int = 1) -> list[Envelope]:
    async with asyncio.timeout(20):
        return [await stream.read() for _ in range(count)]


async def publish(channel: grpc.aio.Channel, topic: str, event: Any, namespace: str = "default") -> None:
    request = PublishRequest(topic=topic, event=event)
    await rpc(channel, f"{EVENTS}/Publish", request, metadata=(("containerd-namespace", namespace),))


async def test_what_is_published_is_told_byte_for_byte_and_in_order(node: TestNode, channel: grpc.aio.Channel) -> None:
    stream = await subscribe(node, channel)
    topics = ["/tenant/Disk.full", "/a", "/tasks/exit"]
    for topic in topics:
        await publish(channel, topic, OPAQUE, "tenant")
    envelopes = await take(stream, 3)
    assert [one.topic for one in envelopes] == topics
    assert {one.namespace for one in envelopes} == {"tenant"}
    assert {one.event.SerializeToString() for one in envelopes} == {OPAQUE.SerializeToString()}
    stamps = [one.timestamp.ToNanoseconds() for one in envelopes]
    assert stamps == sorted(stamps)
    assert stamps[0] > 0


async def test_filters_see_the_fields_of_types_that_are_known(node: TestNode, channel: grpc.aio.Channel) -> None:
    stream = await subscribe(node, channel, "topic==/mine/exit,event.container_id==b")
    for name in ("a", "b"):
        exit = TaskExit(container_id=name, exit_status=7)
        url = f"type.googleapis.com/{exit.DESCRIPTOR.full_name}"
        await publish(channel, "/mine/exit", Any(type_url=url, value=exit.SerializeToString()))
    await publish(channel, "/mine/exit", Any(type_url="containerd.events.TaskExit", value=b"\xff\xff"))
    exit = TaskExit(container_id="b", exit_status=8)
    await publish(channel, "/mine/exit", Any(type_url=exit.DESCRIPTOR.full_name, value=exit.SerializeToString()))
    told = [TaskExit.FromString(one.event.value) for one in await take(stream, 2)]
    assert [(one.container_id, one.exit_status) for one in told] == [("b", 7), ("b", 8)]


async def test_a_forwarded_event_keeps_its_namespace_and_its_time(node: TestNode, channel: grpc.aio.Channel) -> None:
    stream = await subscribe(node, channel, "namespace==elsewhere")
    for at in (Timestamp(seconds=1_700_000_000, nanos=123_456_789), Timestamp()):
        envelope = Envelope(timestamp=at, namespace="elsewhere", topic="/shim/word", event=OPAQUE)
        await rpc(channel, f"{EVENTS}/Forward", ForwardRequest(envelope=envelope))
        [told] = await take(stream)
        assert told == envelope


async def test_an_event_without_a_payload_is_told(node: TestNode, channel: grpc.aio.Channel) -> None:
    stream = await subscribe(node, channel, "topic==/empty")
    await rpc(channel, f"{EVENTS}/Publish", PublishRequest(topic="/empty"), metadata=IN_DEFAULT)
    [told] = await take(stream)
    assert (told.event.type_url, told.event.value) == ("", b"")


async def test_containerds_own_publish_command_is_understood(node: TestNode, channel: grpc.aio.Channel) -> None:
    """Debian's `containerd publish` is what shims of containerd 1.6 report with."""
    address = str(socket_of(node))
    stream = await subscribe(node, channel, "topic==/published/by-binary")
    process = await asyncio.create_subprocess_exec(
        "containerd", "--address", address, "publish", "--topic", "/published/by-binary", "--namespace", "default",
        stdin=asyncio.subprocess.PIPE, env={**os.environ, "TTRPC_ADDRESS": ""},
    )  # fmt: skip
    await process.communicate(OPAQUE.SerializeToString())
    assert process.returncode == 0
    [told] = await take(stream)
    assert told.event == OPAQUE


async def test_a_published_event_outlives_the_service_that_took_it(node: TestNode, channel: grpc.aio.Channel) -> None:
    stream = await subscribe(node, channel, "topic==/outlives")
    await publish(channel, "/outlives", OPAQUE)
    runtime = node.of("runtime")
    await asyncio.to_thread(runtime.kill)
    await asyncio.to_thread(runtime.start)
    await publish(channel, "/outlives", Any(type_url="second"))
    assert [one.event.type_url for one in await take(stream, 2)] == [OPAQUE.type_url, "second"]


@pytest.mark.parametrize("topic", ["", "/", "tasks/exit", "/a//b", "/a/", "/a b", "/a/*", "/ä", "/" + "x" * 77])
async def test_a_topic_that_is_none_is_refused(channel: grpc.aio.Channel, topic: str) -> None:
    code, message = await refusal(channel, f"{EVENTS}/Publish", PublishRequest(topic=topic), metadata=IN_DEFAULT)
    assert code == "INVALID_ARGUMENT"
    assert "topic" in message


async def test_what_is_wrong_with_an_event_has_its_code(channel: grpc.aio.Channel) -> None:
    at = Timestamp(seconds=5)
    forward = f"{EVENTS}/Forward"
    assert (await refusal(channel, f"{EVENTS}/Publish", PublishRequest(topic="/a")))[0] == "FAILED_PRECONDITION"
    for wrong in (
        Envelope(timestamp=at, topic="/a"),
        Envelope(timestamp=at, namespace="no such/name", topic="/a"),
        Envelope(timestamp=at, namespace="default", topic="a"),
        Envelope(namespace="default", topic="/a"),
        Envelope(timestamp=Timestamp(seconds=-62_135_596_800), namespace="default", topic="/a"),
        Envelope(timestamp=Timestamp(seconds=5, nanos=-1), namespace="default", topic="/a"),
        Envelope(timestamp=Timestamp(seconds=1 << 60), namespace="default", topic="/a"),
    ):
        assert (await refusal(channel, forward, ForwardRequest(envelope=wrong)))[0] == "INVALID_ARGUMENT", wrong
    assert (await refusal(channel, forward, ForwardRequest()))[0] == "INVALID_ARGUMENT"
    large = PublishRequest(topic="/a", event=Any(type_url="x", value=bytes(600 << 10)))
    assert (await refusal(channel, f"{EVENTS}/Publish", large, metadata=IN_DEFAULT))[0] == "RESOURCE_EXHAUSTED"
