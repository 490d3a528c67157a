"""The containers' figures on the gateway's `/metrics`, as Prometheus reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from shoal_bus.api import runtime as api

from tests.support import bundle as bundles
from tests.support.natsd import NatsServer, free_port
from tests.support.runtime import RuntimeNode, runtime_node

MIB = 1 << 20


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd) as started:
        yield started


@pytest.fixture
async def http(node: RuntimeNode) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of that node's gateway."""
    port = free_port()
    await asyncio.to_thread(node.node.start, "gateway", arguments=("--http", f":{port}"))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session


async def scrape(http: aiohttp.ClientSession) -> dict[str, Metric]:
    async with http.get("/metrics") as reply:
        assert reply.status == 200
        return {family.name: family for family in text_string_to_metric_families(await reply.text())}


def samples(page: dict[str, Metric], family: str, container: str) -> dict[str, float]:
    """The samples of one container, by name."""
    return {s.name: s.value for s in page[family].samples if s.labels.get("container") == container}


def available(page: dict[str, Metric]) -> float:
    [sample] = page["shoal_container_metrics_available"].samples
    assert sample.labels == {"node": "test-node"}
    return sample.value


async def run(node: RuntimeNode, id: str, *args: str, limits: bool) -> None:
    spec = node.spec(list(args))
    if limits:
        spec["linux"]["resources"] = {
            "memory": {"limit": 64 * MIB}, "pids": {"limit": 17}, "cpu": {"quota": 20_000, "period": 40_000},
        }  # fmt: skip
    await node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id=id, spec=spec))
    await node.client.call(api.TASK_CREATE, api.CreateTask(container_id=id, rootfs=bundles.bind(node.rootfs)))
    await node.start(id)


async def test_every_container_has_its_series(node: RuntimeNode, http: aiohttp.ClientSession) -> None:
    await run(node, "busy", "sh", "-c", "while :; do :; done", limits=True)
    await run(node, "idle", "sleep", "600", limits=False)
    await asyncio.sleep(1)
    page = await scrape(http)
    assert available(page) == 1
    [usage] = [s for s in page["shoal_container_cpu_usage_seconds"].samples if s.labels["container"] == "busy"]
    assert usage.name == "shoal_container_cpu_usage_seconds_total"
    assert usage.labels == {"node": "test-node", "namespace": node.namespace, "container": "busy"}
    assert 0.05 < usage.value < 30

    def value(name: str, container: str) -> float | None:
        return next(iter(samples(page, f"shoal_container_{name}", container).values()), None)

    assert (value("cpu_limit", "busy"), value("cpu_limit", "idle")) == (0.5, None)
    assert (value("memory_limit_bytes", "busy"), value("memory_limit_bytes", "idle")) == (64 * MIB, None)
    assert (value("pids", "busy"), value("pids_limit", "busy"), value("pids_limit", "idle")) == (1, 17, None)
    assert (value("cpu_throttled_seconds", "busy") or 0) > 0
    assert (value("memory_oom_kills", "busy"), value("memory_limit_hits", "idle")) == (0, 0)
    for container in ("busy", "idle"):
        assert 0 < (value("memory_working_set_bytes", container) or 0) <= (value("memory_usage_bytes", container) or 0)
    again = await scrape(http)
    later = samples(again, "shoal_container_cpu_usage_seconds", "busy")
    assert later["shoal_container_cpu_usage_seconds_total"] > usage.value
    assert {family.type for name, family in page.items() if "_container_" in name} == {"counter", "gauge"}


async def test_one_that_has_ended_has_no_series(node: RuntimeNode, http: aiohttp.ClientSession) -> None:
    await run(node, "web", "sleep", "600", limits=False)
    assert samples(await scrape(http), "shoal_container_pids", "web")
    await node.kill("web")
    await node.wait("web")
    page = await scrape(http)
    assert not samples(page, "shoal_container_pids", "web")
    assert available(page) == 1


async def test_without_the_runtime_service_the_rest_of_the_page_comes(
    node: RuntimeNode, http: aiohttp.ClientSession
) -> None:
    await run(node, "web", "sleep", "600", limits=False)
    await asyncio.to_thread(node.copy().kill)
    began = time.monotonic()
    page = await scrape(http)
    assert time.monotonic() - began < 8
    assert available(page) == 0
    assert not samples(page, "shoal_container_pids", "web")
    assert [s.value for s in page["shoal_gateway_bus_connected"].samples] == [1]
    assert {s.labels["service"] for s in page["shoal_service_copies"].samples} >= {"gateway"}
    await asyncio.to_thread(node.copy().start)
    page = await scrape(http)
    assert available(page) == 1
    assert samples(page, "shoal_container_pids", "web") == {"shoal_container_pids": 1}


async def test_without_a_bus_it_says_so(node: RuntimeNode, natsd: NatsServer, http: aiohttp.ClientSession) -> None:
    await asyncio.to_thread(natsd.stop)
    page = await scrape(http)
    assert available(page) == 0
    assert [s.value for s in page["shoal_gateway_bus_connected"].samples] == [0]
    await asyncio.to_thread(natsd.start)
