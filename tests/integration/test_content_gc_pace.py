"""How often garbage is collected that nobody waits for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection

from tests.support.natsd import NatsServer
from tests.support.node import TestNode

SECONDS = 3.0
MOST = 12
"""Collections in that time: with a tenth of a second from each deletion to the next there would be some twenty."""


async def test_deletions_one_after_another_are_collected_now_and_then(
    natsd: NatsServer, connection: Connection, tmp_path: Path
) -> None:
    with TestNode(tmp_path, natsd) as node:
        node.start("snapshot", "content")
        client = Client(connection, node.name)
        await client.call(content.NODE_GC, content.Collect())  # behind the one that a start begins with
        opened: list[float] = []
        await connection.listen(snapshot.GC_OPEN.pattern(node.name), lambda _: opened.append(time.monotonic()))
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            lease = await client.call(content.LEASE_CREATE, content.CreateLease())
            await client.call(content.LEASE_DELETE, content.DeleteLease(id=lease.id))
        assert len(opened) <= MOST
        # Who waits isn't kept waiting, and what was deleted last is collected, too.
        lease = await client.call(content.LEASE_CREATE, content.CreateLease())
        before = len(opened)
        await client.call(content.LEASE_DELETE, content.DeleteLease(id=lease.id, sync=True))
        assert len(opened) > before
        lease = await client.call(content.LEASE_CREATE, content.CreateLease())
        before = len(opened)
        await client.call(content.LEASE_DELETE, content.DeleteLease(id=lease.id))
        async with asyncio.timeout(60):
            while len(opened) == before:
                await asyncio.sleep(0.05)
