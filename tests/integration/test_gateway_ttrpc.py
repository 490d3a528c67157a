"""ttrpc beside gRPC: events forwarded as containerd's shims do, and every frame that makes no sense answered."""

from __future__ import annotations

import asyncio
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from shoal_gateway.proto.containerd.services.events.ttrpc.v1.events_pb2 import ForwardRequest
from shoal_gateway.proto.containerd.services.events.v1.events_pb2 import SubscribeRequest
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope
from shoal_gateway.proto.ttrpc.request_pb2 import KeyValue, Request, Response
from shoal_gateway.ttrpc import AT_ONCE, DATA, LARGEST, REQUEST, RESPONSE

from tests.support.gateway import socket_of, until
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

EVENTS = "containerd.services.events.ttrpc.v1.Events"
HEADER = struct.Struct(">IIBB")
CODES = grpc.StatusCode


@pytest.fixture
async def node(natsd: NatsServer, tmp_path: Path) -> AsyncIterator[TestNode]:
    with TestNode(tmp_path, natsd) as made:
        await asyncio.to_thread(made.start, "runtime", "gateway")
        yield made


class Client:
    """A connection, frame by frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, node: TestNode) -> Client:
        return cls(*await asyncio.open_unix_connection(f"{socket_of(node)}.ttrpc"))

    def send(self, stream: int, data: bytes, kind: int = REQUEST, length: int | None = None) -> None:
        self.writer.write(HEADER.pack(len(data) if length is None else length, stream, kind, 0) + data)

    def call(self, stream: int, payload: bytes, *, service: str = EVENTS, method: str = "Forward") -> None:
        metadata = [KeyValue(key="Containerd-Namespace-TTRPC", value="mine")]
        request = Request(service=service, method=method, payload=payload, timeout_nano=10**10, metadata=metadata)
        self.send(stream, request.SerializeToString())

    async def answer(self) -> tuple[int, Response]:
        async with asyncio.timeout(10):
            length, stream, kind, flags = HEADER.unpack(await self.reader.readexactly(HEADER.size))
            assert (kind, flags) == (RESPONSE, 0)
            return stream, Response.FromString(await self.reader.readexactly(length))

    async def refused(self, stream: int, code: grpc.StatusCode, words: str) -> None:
        answered, response = await self.answer()
        assert (answered, response.status.code) == (stream, code.value[0])
        assert words in response.status.message

    def close(self) -> None:
        self.writer.close()


@pytest.fixture
async def client(node: TestNode) -> AsyncIterator[Client]:
    made = await Client.of(node)
    yield made
    made.close()


def forward(number: int = 0, namespace: str = "other") -> bytes:
    event = AnyMessage(type_url="example.Thing", value=b"\x08\x01")
    at = Timestamp(seconds=1_700_000_000, nanos=number)
    envelope = Envelope(timestamp=at, namespace=namespace, topic=f"/test/{number}", event=event)
    return ForwardRequest(envelope=envelope).SerializeToString()


async def test_events_that_are_forwarded_reach_subscribers_of_grpc(node: TestNode, client: Client) -> None:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as channel:
        stream = channel.unary_stream(
            "/containerd.services.events.v1.Events/Subscribe",
            request_serializer=SubscribeRequest.SerializeToString,
            response_deserializer=Envelope.FromString,
        )(SubscribeRequest(filters=['topic~="/test/"']))
        await until(lambda: "events.subscribed" in node.of("gateway").log.read_text())
        many = AT_ONCE + 20
        for number in range(many):
            client.call(2 * number + 1, forward(number))
        answers = [await client.answer() for _ in range(many)]
        assert sorted(stream for stream, _ in answers) == [2 * number + 1 for number in range(many)]
        assert {response.status.code for _, response in answers} == {0}
        async with asyncio.timeout(20):
            told = [await stream.read() for _ in range(many)]
        assert {one.topic for one in told} == {f"/test/{number}" for number in range(many)}
        assert {(one.namespace, one.timestamp.seconds) for one in told} == {("other", 1_700_000_000)}
        assert (told[0].event.type_url, told[0].event.value) == ("example.Thing", b"\x08\x01")


async def test_what_makes_no_sense_is_answered_and_harms_no_other_call(client: Client) -> None:
    client.send(1, b"", length=LARGEST + 1)
    client.writer.write(bytes(LARGEST + 1))
    await client.refused(1, CODES.RESOURCE_EXHAUSTED, "exceeds")
    client.send(2, b"")
    await client.refused(2, CODES.INVALID_ARGUMENT, "odd")
    client.send(1, b"", DATA)
    await client.refused(1, CODES.INVALID_ARGUMENT, "stream")
    client.send(1, b"from a later version", 9)
    client.send(1, b"\xff")
    await client.refused(1, CODES.INVALID_ARGUMENT, "ttrpc.Request")
    client.call(3, b"", method="Subscribe")
    await client.refused(3, CODES.UNIMPLEMENTED, "/Subscribe")
    client.call(5, b"", service="containerd.services.tasks.v1.Tasks", method="Create")
    await client.refused(5, CODES.UNIMPLEMENTED, "Tasks/Create")
    client.call(7, b"\xff")
    await client.refused(7, CODES.INTERNAL, "unmarshalling")
    client.call(9, b"")
    await client.refused(9, CODES.INVALID_ARGUMENT, "namespace")
    client.call(11, forward(namespace="not/one"))
    await client.refused(11, CODES.INVALID_ARGUMENT, "namespace")
    client.call(11, forward())
    await client.refused(11, CODES.INVALID_ARGUMENT, "higher")
    client.call(13, forward())
    stream, response = await client.answer()
    assert (stream, response.status.code) == (13, 0)


async def test_clients_come_and_go_and_leave_nothing(node: TestNode) -> None:
    fds = Path(f"/proc/{node.of('gateway').pid}/fd")
    warm = await Client.of(node)
    warm.call(1, forward())
    await warm.answer()
    before = len(list(fds.iterdir()))
    for number in range(50):
        client = await Client.of(node)
        client.call(1, forward(number))
        if number % 2:
            client.send(3, b"", length=100)  # and goes in the middle of it
        await client.writer.drain()
        client.close()
    await until(lambda: len(list(fds.iterdir())) <= before)
    warm.call(3, forward())
    assert (await warm.answer())[1].status.code == 0
    warm.close()
    log = node.of("gateway").log.read_text()
    assert "Traceback" not in log, log


async def test_the_socket_is_its_owners_and_goes_with_the_gateway(node: TestNode) -> None:
    socket = Path(f"{socket_of(node)}.ttrpc")
    assert (socket.is_socket(), socket.stat().st_mode & 0o777, socket.stat().st_uid) == (True, 0o660, 0)
    await asyncio.to_thread(node.of("gateway").stop)
    listed = subprocess.run(["ls", "-A", str(socket.parent)], check=True, capture_output=True, text=True).stdout
    assert ".ttrpc" not in listed
