"""Dispatchers and copies of the test service on one node, and every event of theirs so far."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shoal_bus.client import Client
from shoal_bus.connection import connect
from shoal_bus.consumer import read_events
from shoal_bus.events import Event

from tests.support.copies import HERE, Copies
from tests.support.natsd import NatsServer


class CommandNode:
    """Node `n1`: `copies` answer, dispatchers dispatch."""

    def __init__(self, natsd: NatsServer, client: Client, directory: Path) -> None:
        self.natsd, self.client, self.directory = natsd, client, directory
        self.copies = Copies(natsd, directory)
        self.dispatchers: list[subprocess.Popen[bytes]] = []
        self.events: list[Event] = []

    def dispatch(self, *, die: str = "") -> subprocess.Popen[bytes]:
        """Starts one more dispatcher."""
        command = [sys.executable, "-m", "tests.support.dispatcher", "--node", "n1", "--log-level", "debug"]
        command += ["--root", str(self.directory / "root"), "--state", str(self.directory / "state"), "--die", die]
        environment = os.environ | {"SHOAL_NATS_URL": self.natsd.url, "PYTHONPATH": str(HERE)}
        with (self.directory / f"dispatcher{len(self.dispatchers)}.log").open("ab") as log:
            started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=HERE)
        self.dispatchers.append(started)
        return started

    def kill(self, dispatcher: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
        dispatcher.send_signal(number)
        dispatcher.wait(20)

    def outcomes(self, id: str = "") -> list[tuple[str, str]]:
        """What became of commands, in the order it was told: topic and id."""
        return [(e.topic, e.id) for e in self.events if e.service == "commands" and id in ("", e.id)]

    def of(self, id: str) -> Event:
        """The only event of a command."""
        (event,) = (e for e in self.events if e.service == "commands" and e.id == id)
        return event

    async def ended(self, count: int, seconds: float = 30) -> list[tuple[str, str]]:
        """The outcomes, once there are `count`, and a moment has passed in which no other came."""
        deadline = time.monotonic() + seconds
        while len(self.outcomes()) < count:
            assert time.monotonic() < deadline, f"{self.outcomes()}\n{self.log()}"
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        assert len(self.outcomes()) == count, self.outcomes()
        return self.outcomes()

    def log(self) -> str:
        return "\n".join(path.read_text()[-6000:] for path in sorted(self.directory.glob("*.log")))

    async def follow(self) -> None:
        async for received in read_events(self.client.connection, start=1):
            self.events.append(received.event)


@asynccontextmanager
async def command_node(natsd: NatsServer, directory: Path) -> AsyncIterator[CommandNode]:
    """The node while the block lasts."""
    directory.mkdir(parents=True)
    connection = await connect(natsd.address, name="test")
    node = CommandNode(natsd, Client(connection, "n1"), directory)
    following = asyncio.create_task(node.follow())
    try:
        yield node
    finally:
        while not following.done():
            following.cancel()  # Python 3.11's wait_for loses a cancellation that comes together with its answer
            await asyncio.wait({following}, timeout=0.5)
        for dispatcher in node.dispatchers:
            node.kill(dispatcher)
        node.copies.stop_all()
        await connection.close()
