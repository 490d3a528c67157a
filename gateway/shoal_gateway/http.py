"""HTTP for operators: `/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from shoal_bus import discovery
from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.errors import FailedPrecondition, InvalidArgument, ShoalError, Unavailable

from shoal_gateway.metrics import Metrics

log = structlog.get_logger(__name__)

PATIENCE_SECONDS = 1.0
CONTAINERS_SECONDS = 4.0
"""How long the containers' figures may take: less than Prometheus waits, which is ten seconds unless told."""
_SHUTDOWN_SECONDS = 2.0


class Endpoints:
    """What is answered. Nothing here changes anything."""

    def __init__(self, client: Client, metrics: Metrics) -> None:
        self._client, self._metrics = client, metrics
        self._connection, self._node = client.connection, client.node

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application()
        application.router.add_get("/healthz", self.healthz)
        application.router.add_get("/readyz", self.readyz)
        application.router.add_get("/metrics", self.metrics)
        return application

    async def healthz(self, _: web.Request) -> web.Response:
        """200 while the process is alive: for who would restart it."""
        return web.json_response({"status": "ok"})

    async def readyz(self, _: web.Request) -> web.Response:
        """200 when the bus is there and each of the node's services answers; 503 says what is missing."""
        try:
            found = {one.name for one in await discovery.ping(self._connection, self._node, seconds=PATIENCE_SECONDS)}
            bus = True
        except Unavailable:
            found, bus = set(), False
        services = {name: name in found for name in discovery.SERVICES}
        ready = bus and all(services.values())
        body = {"status": "ready" if ready else "not ready", "node": self._node, "bus": bus, "services": services}
        return web.json_response(body, status=200 if ready else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus's text format: the gateway's own counters, the node's services, and its containers."""
        self._metrics.bus.set(self._connection.is_connected)
        services, containers = await asyncio.gather(self._services(), self._containers())
        self._metrics.tasks.set(len(asyncio.all_tasks()))
        text = await asyncio.to_thread(self._metrics.render, services, self._node, containers)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _services(self) -> list[discovery.ServiceStats]:
        try:
            return await discovery.stats(self._connection, self._node, seconds=PATIENCE_SECONDS)
        except Unavailable:
            return []

    async def _containers(self) -> list[runtime.ContainerMetrics] | None:
        """None when the runtime service doesn't tell in time: the rest of the page is wanted all the same."""
        request = runtime.ListMetrics(raw=False)
        try:
            items = self._client.stream(
                runtime.NODE_METRICS, request, timeout=CONTAINERS_SECONDS, patience=PATIENCE_SECONDS
            )
            return [item async for item in items]
        except ShoalError as error:
            log.warning("gateway.no_container_metrics", error=str(error), code=error.code.name)
            return None


@asynccontextmanager
async def serving_http(address: str, endpoints: Endpoints) -> AsyncIterator[None]:
    """Serves on `host:port` for a block."""
    host, port = parse_address(address)
    runner = web.AppRunner(endpoints.application(), access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise FailedPrecondition(f"--http {address}: can't be listened on ({error.strerror})") from None
        log.info("gateway.http", addresses=[f"{host}:{port}" for host, port, *_ in runner.addresses])
        yield
    finally:
        await runner.cleanup()


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `--http`; without a host it is loopback, and never every interface.

    >>> parse_address(":9180"), parse_address("[::1]:80")
    (('127.0.0.1', 9180), ('::1', 80))
    """
    try:
        parts = urlsplit(f"//{address}")
        if parts.port is None or parts.path or parts.username is not None:
            raise ValueError(address)
        return parts.hostname or "127.0.0.1", parts.port
    except ValueError:
        raise InvalidArgument(f"--http {address!r}: must be host:port, as 127.0.0.1:9180") from None
