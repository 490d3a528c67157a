"""A snapshotter that is a process of its own: the claims of all snapshotters over the bus, beside the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_runtime.shim.mounts import mounts_below

from tests.support.images import Layer, directory, file, whiteout
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import Remote, SnapshotterClaims, context, mounted, write_blob

NAME = "external"


@pytest.fixture
async def snapshots(tmp_path: Path, natsd: NatsServer, connection: Connection) -> AsyncIterator[Remote]:
    with TestNode(tmp_path, natsd) as node:
        (node.root / "content").mkdir(parents=True)
        node.start("snapshot")
        node.start(NAME, module="tests.support.external_snapshotter")
        yield Remote(Client(connection, node.name), NAME, node.root / NAME / "files")
    assert mounts_below(str(tmp_path)) == []


class TestExternal(SnapshotterClaims):
    COPIES = True


async def test_layers_are_unpacked_into_it(snapshots: Remote, tmp_path: Path) -> None:
    client = snapshots._client
    below = ""
    for number, entries in enumerate(([directory("d"), file("d/a"), file("d/b")], [whiteout("d/a"), file("d/c")])):
        path, blob, diff_id = write_blob(tmp_path, Layer(entries))
        request = api.UnpackLayer(name=f"l{number}", parent=below, descriptor=blob, path=str(path), diff_id=diff_id)
        below = (await client.operate(api.SNAPSHOT_UNPACK.on(NAME), request, timeout=60)).key
    mounts = (await snapshots.view(context(), api.PrepareSnapshot(key="v", parent=below))).mounts
    with mounted(mounts, tmp_path) as root:
        assert sorted(p.name for p in (root / "d").iterdir()) == ["b", "c"]


async def test_it_tells_of_itself_and_what_becomes_of_its_snapshots(snapshots: Remote) -> None:
    client = snapshots._client
    info = await client.call(api.SNAPSHOT_INFO.on(NAME), api.SnapshotterRequest())
    assert (info.name, info.mount_type) == (NAME, "bind")
    others = await client.collect(api.SNAPSHOTTER_LIST, api.SnapshotterRequest())
    assert NAME not in [other.name for other in others], "those of the service alone"
    await snapshots.prepare(context(), api.PrepareSnapshot(key="a"))
    assert [s.key async for s in client.stream(api.SNAPSHOT_LIST, api.ListSnapshots())] == []
    await snapshots.remove(context(), api.SnapshotRequest(key="a"))
    told: list[tuple[str, str, str]] = []
    while len(told) < 2:
        told = [
            (r.event.service, r.event.topic, r.event.id)
            async for r in read_events(client.connection, start=1, follow=False)
        ]
    assert told == [(NAME, "/snapshot/prepare", "a"), (NAME, "/snapshot/remove", "a")]
