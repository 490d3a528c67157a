"""The standard gRPC health service (https://github.com/grpc/grpc/blob/master/doc/health-checking.md)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection

from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from shoal_bus.connection import Connection
from shoal_bus.errors import NotFound

from shoal_gateway.call import Call
from shoal_gateway.rpc import Servicer

_WATCH_SECONDS = 0.25


class Health(Servicer):
    """SERVING while the bus is there. Asked for the server as a whole (an empty name), or for one of its services."""

    service = health_pb2.DESCRIPTOR.services_by_name["Health"]

    def __init__(self, connection: Connection, served: Collection[str]) -> None:
        self._connection, self._served = connection, served

    async def check(self, call: Call, request: HealthCheckRequest) -> HealthCheckResponse:
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFound(f"unknown service {request.service!r}")
        return HealthCheckResponse(status=status)

    async def watch(self, call: Call, request: HealthCheckRequest) -> AsyncGenerator[HealthCheckResponse, None]:
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                yield HealthCheckResponse(status=status)
                told = status
            await asyncio.sleep(_WATCH_SECONDS)

    def _status(self, name: str) -> HealthCheckResponse.ServingStatus:
        if name and name not in self._served:
            return HealthCheckResponse.SERVICE_UNKNOWN
        up = self._connection.is_connected
        return HealthCheckResponse.SERVING if up else HealthCheckResponse.NOT_SERVING
