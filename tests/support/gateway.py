"""A gateway for tests: what runs containerd's clients against it, and what puts real events on the bus."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from shoal_bus.connection import Connection
from shoal_bus.database import Database
from shoal_bus.events import Topic
from shoal_bus.harness import Service
from shoal_bus.locks import Locks
from shoal_bus.message import Message as BusMessage
from shoal_bus.relay import Relay

from tests.support.node import TestNode


def socket_of(node: TestNode) -> Path:
    """The socket of a node's gateway, where no flag says otherwise."""
    return node.state / "containerd.sock"


def ctr(socket: Path, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    """Debian's ctr."""
    return subprocess.run(
        ["ctr", "--address", str(socket), *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


async def rpc(
    channel: grpc.aio.Channel, method: str, request: Message | bytes, *, reply: type[Message] | None = None, **call: Any
) -> Any:
    """One unary call, of a message or of any bytes."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    answer = await channel.unary_unary(method)(data, timeout=call.pop("timeout", 15), **call)
    return reply.FromString(answer) if reply is not None else answer


async def refusal(channel: grpc.aio.Channel, method: str, request: Message | bytes, **call: Any) -> tuple[str, str]:
    """The code's name and the sentence of a call that is refused."""
    try:
        await rpc(channel, method, request, **call)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    raise AssertionError(f"{method} was answered")


class Emitter:
    """A service's outbox and its relay, in the test's own process: what is committed there is told on the bus."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def emit(self, namespace: str, *events: tuple[Topic[Any], BusMessage]) -> None:
        """Commits events, all in one transaction."""
        with self._database.write() as tx:
            for topic, payload in events:
                tx.emit(namespace, topic, payload)


@asynccontextmanager
async def emitting(connection: Connection, directory: Path, node: str, service: str) -> AsyncIterator[Emitter]:
    """An emitter of `service`'s events."""
    database = Database(directory / "metadata.db", node, [], service=service)
    locks = Locks(directory / "locks")
    harness = Service(service, connection, node=node, database=database, locks=locks)
    harness.background(Relay(harness, database, locks).run(), "relay")
    await harness.start()
    try:
        yield Emitter(database)
    finally:
        await harness.drain()
        locks.close()
        database.close()


async def until(condition: Any, seconds: float = 15) -> None:
    """Returns when `condition()` is true; AssertionError when it isn't in time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def lines_of(data: bytes | str, *words: str) -> Sequence[str]:
    """The lines of a command's output that hold all of `words`."""
    text = data.decode() if isinstance(data, bytes) else data
    return [line for line in text.splitlines() if all(word in line for word in words)]
