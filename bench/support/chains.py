"""A chain of a hundred snapshots: prepared and committed one on top of the other, then removed from the top.

Both are asked by a client that stays connected, containerd by its gRPC API and shoal by its bus: a process started for
each step would be most of what is measured.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.empty_pb2 import Empty
from shoal_bus import node as nodes
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client

from bench.support import fresh, messages
from bench.support.effort import Effort
from bench.support.figures import Row, compare
from bench.support.scratch import Scratch

LENGTH = 100
BUDGET = 1.0
_STEPS = ("prepare", "commit", "remove")
_KEPT = {"containerd.io/gc.root": "bench"}


class _Snapshots(ABC):
    """One side's overlayfs snapshotter."""

    @abstractmethod
    async def prepare(self, key: str, parent: str) -> Path:
        """Returns the directory that what is written to it ends up in."""

    @abstractmethod
    async def commit(self, name: str, key: str) -> None: ...

    @abstractmethod
    async def remove(self, key: str) -> None: ...


class _OfContainerd(_Snapshots):
    def __init__(self, channel: grpc.aio.Channel, protocol: Any) -> None:
        self._channel, self._protocol = channel, protocol

    async def _ask(self, method: str, request: Any, reply: Any) -> Any:
        call = self._channel.unary_unary(
            f"/containerd.services.snapshots.v1.Snapshots/{method}",
            request_serializer=lambda one: one.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        return await call(request, metadata=(("containerd-namespace", "bench"),))

    async def prepare(self, key: str, parent: str) -> Path:
        request = self._protocol.PrepareSnapshotRequest(snapshotter="overlayfs", key=key, parent=parent, labels=_KEPT)
        return _upper((await self._ask("Prepare", request, self._protocol.PrepareSnapshotResponse)).mounts[0])

    async def commit(self, name: str, key: str) -> None:
        request = self._protocol.CommitSnapshotRequest(snapshotter="overlayfs", name=name, key=key, labels=_KEPT)
        await self._ask("Commit", request, Empty)

    async def remove(self, key: str) -> None:
        await self._ask("Remove", self._protocol.RemoveSnapshotRequest(snapshotter="overlayfs", key=key), Empty)


class _OfShoal(_Snapshots):
    def __init__(self, client: Client) -> None:
        self._client = client

    async def prepare(self, key: str, parent: str) -> Path:
        request = api.PrepareSnapshot(key=key, parent=parent, labels=_KEPT)
        return _upper((await self._client.call(api.SNAPSHOT_PREPARE, request)).mounts[0])

    async def commit(self, name: str, key: str) -> None:
        await self._client.call(api.SNAPSHOT_COMMIT, api.CommitSnapshot(name=name, key=key, labels=_KEPT))

    async def remove(self, key: str) -> None:
        await self._client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key=key))


def _upper(mount: Any) -> Path:
    for option in mount.options:
        if option.startswith("upperdir="):
            return Path(option.removeprefix("upperdir="))
    return Path(mount.source)


@asynccontextmanager
async def _containerd(scratch: Scratch) -> AsyncIterator[_Snapshots]:
    protocol = messages.generate(scratch.directory / "proto")["snapshots"]
    with fresh.fresh_containerd(scratch) as side:
        async with grpc.aio.insecure_channel(f"unix:{side.daemon.address}") as channel:
            yield _OfContainerd(channel, protocol)


@asynccontextmanager
async def _shoal(scratch: Scratch) -> AsyncIterator[_Snapshots]:
    with fresh.fresh_shoal(scratch) as side:
        found = nodes.load(side.node.state)
        async with Client.open(found.address, found.name, "bench", name="shoal-bench") as client:
            yield _OfShoal(client)


async def measure(scratch: Scratch, effort: Effort) -> list[Row]:
    """Both in turn; a figure is the median of a step over the chain."""
    times: dict[str, dict[str, list[float]]] = {step: {"containerd": [], "shoal": []} for step in _STEPS}
    opened: dict[str, AbstractAsyncContextManager[_Snapshots]]
    for _ in range(effort.rounds):
        opened = {"containerd": _containerd(scratch), "shoal": _shoal(scratch)}
        for name, opening in opened.items():
            async with opening as snapshots:
                for step, took in (await _chain(snapshots)).items():
                    times[step][name].append(statistics.median(took) * 1000)
    return [_row(step, times[step]) for step in _STEPS]


def _row(step: str, times: dict[str, list[float]]) -> Row:
    name, note = f"snapshot {step}, in a chain of {LENGTH}", "containerd's files go later" if step == "remove" else ""
    return compare(name, "ms", times["containerd"], times["shoal"], budget=BUDGET, note=note)


async def _chain(snapshots: _Snapshots) -> dict[str, list[float]]:
    spent: dict[str, list[float]] = {step: [] for step in _STEPS}

    async def timed(step: str, doing: Awaitable[Any]) -> Any:
        begun = time.perf_counter()
        result = await doing
        spent[step].append(time.perf_counter() - begun)
        return result

    parent = ""
    for number in range(LENGTH):
        upper = await timed("prepare", snapshots.prepare(f"active-{number}", parent))
        (upper / f"file-{number}").write_bytes(bytes(1000))
        await timed("commit", snapshots.commit(f"layer-{number}", f"active-{number}"))
        parent = f"layer-{number}"
    for number in reversed(range(LENGTH)):
        await timed("remove", snapshots.remove(f"layer-{number}"))
    return spent
