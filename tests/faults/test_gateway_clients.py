"""Hundreds of clients at once, half of them killed in the middle: nothing of them is left, in no process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.message import Message
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_gateway.proto.containerd.services.containers.v1.containers_pb2 import ListContainersRequest
from shoal_gateway.proto.containerd.services.content.v1 import content_pb2 as pb
from shoal_gateway.proto.containerd.services.events.v1.events_pb2 import SubscribeRequest
from shoal_gateway.proto.containerd.services.snapshots.v1.snapshots_pb2 import ListSnapshotsRequest
from shoal_gateway.proto.containerd.services.tasks.v1.tasks_pb2 import WaitRequest
from shoal_gateway.proto.containerd.services.transfer.v1.transfer_pb2 import TransferRequest
from shoal_gateway.proto.containerd.types.transfer.imagestore_pb2 import ImageStore
from shoal_gateway.proto.containerd.types.transfer.importexport_pb2 import ImageExportStream, ImageImportStream
from shoal_gateway.proto.containerd.types.transfer.registry_pb2 import OCIRegistry

from tests.support.gateway_tasks import CONTAINERS, EVENTS, TASKS, GatewayNode, gateway_node
from tests.support.natsd import free_port
from tests.support.stored import store_blob
from tests.support.transfer_client import TRANSFER, TransferClient, packed

CLIENTS = 200
CONTENT = "/containerd.services.content.v1.Content"
SNAPSHOTS = "/containerd.services.snapshots.v1.Snapshots/List"
BLOB = bytes(range(256)) * (32 << 10)
MEMORY = 96 << 20
"""What a process may have more than before: allocators keep what the busiest moment took, which isn't always the same.
(Over eight waves it doesn't grow.)"""
FEW = 5
"""What may be more of anything by chance (a look at a service, a connection kept): a leak would be of every client, or
of the ten that are killed in the middle of the same."""
Work = Callable[[grpc.aio.Channel, int], Awaitable[None]]


class Cable:
    """Between a client and the gateway; `cut` is what the gateway sees of a client's `kill -9`."""

    def __init__(self, socket: Path, place: Path) -> None:
        self._socket, self.place = socket, place
        self._pumps: set[asyncio.Task[None]] = set()
        self._ends: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def plugged(self) -> AsyncIterator[Cable]:
        server = await asyncio.start_unix_server(self._connected, self.place)
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._pumps, return_exceptions=True)
            self.place.unlink()

    def cut(self) -> None:
        for end in self._ends:
            end.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket)
        self._ends += writer, back
        for source, target in ((reader, back), (there, writer)):
            self._pumps.add(asyncio.create_task(_pump(source, target)))


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await source.read(64 << 10):
            target.write(data)
            await target.drain()
    target.close()


@dataclass
class Silent:
    """A registry that takes every request and answers none."""

    port: int = 0
    connections: set[asyncio.StreamWriter] = field(default_factory=set)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Silent]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        with suppress(ConnectionError):
            while await reader.read(4096):
                pass
        self.connections.discard(writer)
        writer.close()


class Clients:
    """One kind of call each. All of them would go on for as long as they are let."""

    def __init__(self, gateway: GatewayNode, digest: str, silent: Silent) -> None:
        self.metadata = (("containerd-namespace", gateway.namespace),)
        self.socket, self.namespace = str(gateway.socket), gateway.namespace
        self.digest, self.silent = digest, silent

    @property
    def kinds(self) -> list[Work]:
        return [
            self.ask, self.list, self.read, self.write, self.subscribe, self.wait, self.pull, self.import_,
            self.pass_on, self.stream, self.program,
        ]  # fmt: skip

    async def ask(self, channel: grpc.aio.Channel, number: int) -> None:
        while True:
            request = ListContainersRequest().SerializeToString()
            await channel.unary_unary(f"{CONTAINERS}/List")(request, metadata=self.metadata)

    async def list(self, channel: grpc.aio.Channel, number: int) -> None:
        while True:
            await self._all(channel, f"{CONTENT}/List", pb.ListContentRequest())
            await self._all(channel, SNAPSHOTS, ListSnapshotsRequest(snapshotter="overlayfs"))

    async def read(self, channel: grpc.aio.Channel, number: int) -> None:
        while True:
            await self._all(channel, f"{CONTENT}/Read", pb.ReadContentRequest(digest=self.digest), pause=0.01)

    async def write(self, channel: grpc.aio.Channel, number: int) -> None:
        call = channel.stream_stream(f"{CONTENT}/Write")(metadata=self.metadata)
        offset = 0
        while True:
            piece = pb.WriteContentRequest(action=pb.WRITE, ref=f"half-{number}", offset=offset, data=bytes(10_000))
            try:
                await call.write(piece.SerializeToString())
                await call.read()
            except asyncio.InvalidStateError:  # it has been refused: that says more
                raise AssertionError(f"{await call.code()}: {await call.details()}") from None
            offset += 10_000
            await asyncio.sleep(0.02)

    async def subscribe(self, channel: grpc.aio.Channel, number: int) -> None:
        await self._all(channel, f"{EVENTS}/Subscribe", SubscribeRequest())

    async def wait(self, channel: grpc.aio.Channel, number: int) -> None:
        request = WaitRequest(container_id="waited").SerializeToString()
        await channel.unary_unary(f"{TASKS}/Wait")(request, metadata=self.metadata)

    async def pull(self, channel: grpc.aio.Channel, number: int) -> None:
        await self._transfer(
            channel,
            OCIRegistry(reference=f"127.0.0.1:{self.silent.port}/silent:{number}"),
            ImageStore(name=f"silent:{number}"),
        )

    async def import_(self, channel: grpc.aio.Channel, number: int) -> None:
        async with TransferClient(channel, self.namespace).stream(f"in-{number}") as stream:
            await self._transfer(channel, ImageImportStream(stream=stream.name), ImageStore())

    async def pass_on(self, channel: grpc.aio.Channel, number: int) -> None:
        client = TransferClient(channel, self.namespace)
        async with client.stream(f"from-{number}") as source, client.stream(f"to-{number}") as target:
            await self._transfer(channel, ImageImportStream(stream=source.name), ImageExportStream(stream=target.name))

    async def stream(self, channel: grpc.aio.Channel, number: int) -> None:
        async with TransferClient(channel, self.namespace).stream(f"idle-{number}"):
            await asyncio.sleep(3600)

    async def program(self, channel: grpc.aio.Channel, number: int) -> None:
        """Debian's ctr, in the middle of something, until it is really killed."""
        command = ("events",) if number % 2 else ("content", "get", self.digest)
        unread, output = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                "ctr", "--address", self.socket, "--namespace", self.namespace, *command, stdout=output
            )
            os.close(output)
            try:
                await process.wait()  # its pipe is full soon
            finally:
                process.kill()
                await process.wait()
        finally:
            os.close(unread)

    async def _transfer(self, channel: grpc.aio.Channel, source: Message, target: Message) -> None:
        request = TransferRequest(source=packed(source), destination=packed(target)).SerializeToString()
        await channel.unary_unary(TRANSFER)(request, metadata=self.metadata)

    async def _all(self, channel: grpc.aio.Channel, method: str, request: Message, pause: float = 0) -> None:
        async for _ in channel.unary_stream(method)(request.SerializeToString(), metadata=self.metadata):
            await asyncio.sleep(pause)


@dataclass(frozen=True)
class Held:
    """What the processes of a node hold."""

    files: dict[str, int]
    subscriptions: dict[str, int]
    in_flight: float
    subscribers: float
    tasks: float


class Node:
    """A node, and what can be seen of it from outside."""

    def __init__(self, gateway: GatewayNode, http: int, monitor: int) -> None:
        self.gateway, self._http, self._monitor = gateway, http, monitor

    def held(self) -> Held:
        page = _get(f"http://127.0.0.1:{self._http}/metrics").decode()
        return Held(
            {one.name: psutil.Process(one.pid).num_fds() for one in self.gateway.node.services},
            {one["name"]: one["subscriptions"] for one in self._connections()},
            _sum(page, "shoal_gateway_requests_in_flight"),
            _sum(page, "shoal_gateway_event_subscribers"),
            _sum(page, "shoal_gateway_tasks"),
        )

    def memory(self) -> dict[str, int]:
        return {one.name: psutil.Process(one.pid).memory_full_info().uss for one in self.gateway.node.services}

    def _connections(self) -> list[dict[str, Any]]:
        return json.loads(_get(f"http://127.0.0.1:{self._monitor}/connz"))["connections"]  # type: ignore[no-any-return]


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read()  # type: ignore[no-any-return]


def _sum(page: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    http, monitor = free_port(), free_port()
    extra = f'http: "127.0.0.1:{monitor}"'
    with gateway_node(tmp_path, "content", "snapshot", gateway=("--http", f":{http}"), bus=extra) as made:
        yield Node(made, http, monitor)


async def wave(clients: Clients, gateway: GatewayNode, place: Path, *, first: int) -> None:
    """All of them at once for a moment; then every other one is killed, and the rest leave."""
    kinds = clients.kinds

    async def one(number: int) -> None:
        async with Cable(gateway.socket, place / f"{number}.sock").plugged() as cable:
            pool = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(f"unix:{cable.place}", options=pool) as channel:
                working = asyncio.ensure_future(kinds[number % len(kinds)](channel, first + number))
                await asyncio.sleep(1.5 + 0.01 * (number % 17))
                if working.done():
                    working.result()  # none ends by itself
                if number // len(kinds) % 2:
                    cable.cut()
                    await asyncio.sleep(0.1)
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)

    await asyncio.gather(*(one(number) for number in range(CLIENTS)))


async def settled(node: Node, before: Held) -> None:
    """Waits until nothing more is held than before."""
    async with asyncio.timeout(15):
        while (now := await asyncio.to_thread(node.held)) != before:
            if fewer(now, before):
                return
            await asyncio.sleep(0.2)


def fewer(now: Held, before: Held) -> bool:
    """Nothing more of anything."""
    return (
        all(now.files[name] < before.files[name] + FEW for name in before.files)
        and all(now.subscriptions.get(name, 0) < count + FEW for name, count in before.subscriptions.items())
        and (now.in_flight, now.subscribers) == (0, 0)
        and now.tasks < before.tasks + FEW
    )


async def test_200_clients_of_every_kind_half_of_them_killed_leave_nothing(node: Node, tmp_path: Path) -> None:
    gateway = node.gateway
    places = Path(tmp_path / "c")
    places.mkdir()
    async with (
        Client.open(gateway.node.natsd.address, gateway.node.name, gateway.namespace) as bus,
        Silent().listening() as silent,
    ):
        digest = await store_blob(bus, BLOB)
        clients = Clients(gateway, digest, silent)
        async with gateway.calls() as calls:
            await calls.run("waited")
        await wave(clients, gateway, places, first=0)  # what is made once, and kept, is there from here on
        await asyncio.sleep(1)
        before, memory = await asyncio.to_thread(node.held), node.memory()
        await wave(clients, gateway, places, first=CLIENTS)
        try:
            await settled(node, before)
        except TimeoutError:
            raise AssertionError(f"{before}\n{await asyncio.to_thread(node.held)}") from None
        grown = {name: now - memory[name] for name, now in node.memory().items()}
        assert all(more < MEMORY for more in grown.values()), grown
        assert not silent.connections
        # What was half written is anybody's to go on with, as with containerd, and nobody's any more.
        ingests = await bus.collect(content.INGEST_LIST, content.ListBlobs())
        assert {one.ref for one in ingests} <= {f"half-{number}" for number in range(2 * CLIENTS)}
        for one in ingests:
            await bus.call(content.INGEST_ABORT, content.IngestRequest(ref=one.ref))
        assert await bus.collect(content.INGEST_LIST, content.ListBlobs()) == []
        assert await bus.collect(content.IMAGE_LIST, content.ListImages()) == []
        async with gateway.calls() as calls:
            await calls.end("waited")
    assert list((gateway.node.state / "archives").iterdir()) == []
    for service in gateway.node.services:
        assert "Traceback" not in service.log.read_text(), service.name
