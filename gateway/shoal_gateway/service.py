"""The gateway on the bus: a service like any other, so that `nats micro ls` and `shoal nodes` show it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from shoal_bus.api import gateway
from shoal_bus.context import Context
from shoal_bus.harness import Service
from shoal_bus.node import Node


def register(service: Service, node: Node, *, address: Path, http: str, version: str) -> None:
    """Registers the gateway's only verb."""
    info = gateway.NodeInfo(
        node=node.name,
        version=version,
        pid=os.getpid(),
        address=str(address.absolute()),
        http=http,
        root=str(node.root),
        state=str(node.state),
        kernel=platform.release(),
        architecture=platform.machine(),
    )

    async def node_info(_: Context, request: gateway.NodeInfoRequest) -> gateway.NodeInfo:
        return info

    service.handle(gateway.NODE_INFO, node_info)
