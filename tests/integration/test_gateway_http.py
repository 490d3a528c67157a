"""The gateway's HTTP: alive, ready, and what it counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from shoal_bus.connection import Connection
from shoal_bus.discovery import SERVICES
from shoal_bus.harness import Service

from tests.support.gateway import ctr, socket_of
from tests.support.natsd import NatsServer, free_port
from tests.support.node import TestNode


@pytest.fixture
async def node(natsd: NatsServer, tmp_path: Path) -> AsyncIterator[TestNode]:
    with TestNode(tmp_path, natsd) as made:
        yield made


@pytest.fixture
async def http(node: TestNode) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a gateway that serves HTTP."""
    port = free_port()
    await asyncio.to_thread(node.start, "gateway", arguments=("--http", f":{port}"))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session


async def sample(http: aiohttp.ClientSession, name: str, **labels: str) -> float:
    """The value of one sample of `/metrics`."""
    async with http.get("/metrics") as reply:
        assert reply.status == 200
        families = text_string_to_metric_families(await reply.text())
    return next(one.value for family in families for one in family.samples if (one.name, one.labels) == (name, labels))


async def test_it_is_alive_without_a_bus_but_not_ready(natsd: NatsServer, http: aiohttp.ClientSession) -> None:
    async with http.get("/healthz") as reply:
        assert (reply.status, await reply.json()) == (200, {"status": "ok"})
    await asyncio.to_thread(natsd.stop)
    async with http.get("/healthz") as reply:
        assert reply.status == 200
    async with http.get("/readyz") as reply:
        assert (reply.status, (await reply.json())["bus"]) == (503, False)
    assert await sample(http, "shoal_gateway_bus_connected") == 0


async def test_it_is_ready_once_every_service_answers(
    node: TestNode, http: aiohttp.ClientSession, connection: Connection
) -> None:
    async def readiness() -> tuple[int, list[str]]:
        async with http.get("/readyz") as reply:
            body = await reply.json()
            return reply.status, sorted(name for name, there in body["services"].items() if there)

    assert await readiness() == (503, [])
    # Another node's services, and others' with the same protocol, are none of ours.
    elsewhere = Service("content", connection, node="elsewhere")
    await elsewhere.start()
    assert await readiness() == (503, [])
    services = []
    for name in SERVICES:
        services.append(Service(name, connection, node=node.name))
        await services[-1].start()
        assert (await readiness())[0] == (200 if len(services) == len(SERVICES) else 503)
    await services[0].drain(1)
    assert await readiness() == (503, sorted(SERVICES[1:]))
    for service in [*services[1:], elsewhere]:
        await service.drain(1)


async def test_metrics_count_calls_by_method_and_code(node: TestNode, http: aiohttp.ClientSession) -> None:
    for _ in range(3):
        assert (await asyncio.to_thread(ctr, socket_of(node), "version")).returncode == 0
    await asyncio.to_thread(ctr, socket_of(node), "plugins", "ls", "id==")
    version = {"service": "containerd.services.version.v1.Version", "method": "Version"}
    assert await sample(http, "shoal_gateway_requests_total", code="OK", **version) == 3
    assert await sample(http, "shoal_gateway_request_seconds_count", **version) == 3
    assert await sample(http, "shoal_gateway_requests_in_flight", **version) == 0
    plugins = {"service": "containerd.services.introspection.v1.Introspection", "method": "Plugins"}
    assert await sample(http, "shoal_gateway_requests_total", code="INVALID_ARGUMENT", **plugins) == 1
    assert await sample(http, "shoal_gateway_bus_connected") == 1
    assert await sample(http, "shoal_service_copies", service="gateway") == 1


def test_without_being_told_it_serves_no_http(node: TestNode) -> None:
    [gateway] = node.start("gateway")
    assert "gateway.http" not in gateway.log.read_text()


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:99999"])
def test_an_address_it_cant_use_is_one_line(node: TestNode, address: str) -> None:
    with pytest.raises(AssertionError) as failed:
        node.start("gateway", arguments=("--http", address))
    assert "shoal-gateway: --http" in str(failed.value)
    assert "[INVALID_ARGUMENT]" in str(failed.value)
    assert "Traceback" not in str(failed.value)
