"""The gateway killed, doubled and cut off from the bus: the socket answers again, and nothing is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from shoal_gateway.listener import Listener
from shoal_gateway.proto.containerd.services.version.v1.version_pb2 import VersionResponse

from tests.support.gateway import ctr, rpc, socket_of
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

VERSION = "/containerd.services.version.v1.Version/Version"


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as made:
        yield made


def sockets(node: TestNode) -> list[str]:
    return sorted(path.name for path in node.state.iterdir() if path.is_socket())


def answers(node: TestNode) -> bool:
    return ctr(socket_of(node), "version", timeout=10).returncode == 0


def test_a_killed_gateway_serves_the_same_socket_again(node: TestNode) -> None:
    [gateway] = node.start("gateway")
    for _ in range(3):
        assert answers(node)
        gateway.kill()
        assert not answers(node)
        gateway.start()
    assert answers(node)
    names = ("containerd.sock", "containerd.sock.ttrpc")
    own = [Listener(node.state / name).own.with_suffix(f".{gateway.pid}").name for name in names]
    assert sockets(node) == sorted([*names, *own])
    assert gateway.stop() == 0
    assert sockets(node) == []


async def test_a_client_that_stays_reaches_the_gateway_after_it(node: TestNode) -> None:
    [gateway] = node.start("gateway")
    async with grpc.aio.insecure_channel(
        f"unix:{socket_of(node)}", options=[("grpc.max_reconnect_backoff_ms", 200)]
    ) as channel:
        await rpc(channel, VERSION, Empty(), reply=VersionResponse)
        gateway.kill()
        gateway.start()
        assert await rpc(channel, VERSION, Empty(), reply=VersionResponse, wait_for_ready=True, timeout=20)


def test_a_second_copy_takes_the_path_and_gives_it_back_when_killed(node: TestNode) -> None:
    first, second = node.start("gateway", "gateway")
    assert answers(node)
    second.kill()
    deadline = time.monotonic() + 10
    while not answers(node) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answers(node)
    second.start()
    assert answers(node)
    assert first.stop() == 0
    assert answers(node)
    assert second.stop() == 0
    assert sockets(node) == []


def test_stopping_ends_a_subscriber_in_bounded_time(node: TestNode) -> None:
    import subprocess

    [gateway] = node.start("gateway")
    with subprocess.Popen(
        ["ctr", "--address", str(socket_of(node)), "events"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as client:
        deadline = time.monotonic() + 10
        while "events.subscribed" not in gateway.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - began < 15
        assert client.wait(10) != 0
    assert "Traceback" not in gateway.log.read_text()


async def test_health_follows_the_bus(node: TestNode, natsd: NatsServer) -> None:
    node.start("gateway")
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )(HealthCheckRequest())
        async with asyncio.timeout(20):
            told = [(await watch.read()).status]
            await asyncio.to_thread(natsd.stop)
            told.append((await watch.read()).status)
            await asyncio.to_thread(natsd.start)
            told.append((await watch.read()).status)
    assert told == [HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING, HealthCheckResponse.SERVING]
