"""Who is on the bus: the services of every node, by NATS's micro protocol (`$SRV.INFO`, as `nats micro ls` asks)."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from shoal_bus.connection import Connection

COLLECT_SECONDS = 0.5
_PREFIX = "shoal-"


@dataclass
class ServiceOfNode:
    """The copies of one service on one node."""

    node: str
    service: str
    versions: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)


async def collect(connection: Connection, seconds: float = COLLECT_SECONDS) -> list[ServiceOfNode]:
    """Everything of shoal's that answers within `seconds`, by node and service."""
    found: dict[tuple[str, str], ServiceOfNode] = {}

    async def take(message: Any) -> None:
        told = _parse(message.data)
        if told is None:
            return
        node, service, version, id = told
        entry = found.setdefault((node, service), ServiceOfNode(node, service))
        entry.versions.add(version)
        entry.ids.add(id)

    inbox = connection.new_inbox()
    subscription = await connection.subscribe(inbox, cb=take)
    try:
        await connection.publish("$SRV.PING", b"", reply=inbox)
        await asyncio.sleep(seconds)
    finally:
        await subscription.unsubscribe()
    return [found[key] for key in sorted(found)]


def _parse(data: bytes) -> tuple[str, str, str, str] | None:
    """Node, service, version and id; None for other people's services, which share the protocol."""
    try:
        told = json.loads(data)
        name, node = told["name"], told["metadata"]["node"]
        if not name.startswith(_PREFIX):
            return None
        return str(node), name.removeprefix(_PREFIX), str(told["version"]), str(told["id"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
