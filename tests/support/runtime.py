"""A runtime service on a bus of its own, for tests: containers of busybox, their events, and what they leave."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.connection import connect
from shoal_bus.consumer import read_events
from shoal_bus.errors import NotFound
from shoal_bus.events import Event

from tests.support import bundle as bundles
from tests.support.leaks import mounts, processes
from tests.support.natsd import NatsServer
from tests.support.node import ServiceProcess, TestNode

LIFE = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


class RuntimeNode:
    """A node with copies of the runtime service, a client, and every event so far. Its namespace is nobody else's."""

    def __init__(self, directory: Path, natsd: NatsServer, client: Client, node: TestNode) -> None:
        self.directory, self.natsd, self.client, self.node = directory, natsd, client, node
        self.rootfs = bundles.busybox_rootfs(directory / "rootfs")
        self.events: list[Event] = []

    @property
    def namespace(self) -> str:
        return self.client.namespace

    def copy(self, number: int = 0) -> ServiceProcess:
        return self.node.of("runtime", number)

    def spec(self, args: list[str]) -> dict[str, Any]:
        spec = bundles.spec(args)
        spec["linux"]["cgroupsPath"] = f"/{self.namespace}/{secrets.token_hex(6)}"
        return spec

    async def container(self, id: str, *args: str, labels: dict[str, str] | None = None) -> None:
        request = api.CreateContainer(id=id, spec=self.spec(list(args)), labels=labels or {})
        await self.client.call(api.CONTAINER_CREATE, request)

    async def create(self, id: str, *args: str, **more: Any) -> api.Task:
        """A container and its task, created."""
        await self.container(id, *args)
        return await self.client.call(
            api.TASK_CREATE, api.CreateTask(container_id=id, rootfs=bundles.bind(self.rootfs)), **more
        )

    async def run(self, id: str, *args: str) -> api.Task:
        await self.create(id, *args)
        return await self.start(id)

    async def start(self, container_id: str, **more: Any) -> api.Task:
        return await self.client.call(api.TASK_START, api.ProcessRequest(container_id=container_id), **more)

    async def wait(self, id: str) -> api.Exit:
        return await self.client.call(api.TASK_WAIT, api.ProcessRequest(container_id=id), timeout=60)

    async def kill(self, id: str, signal: int = 9) -> None:
        await self.client.call(api.TASK_KILL, api.KillTask(container_id=id, signal=signal))

    async def delete(self, id: str) -> api.Exit:
        return await self.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id))

    async def remove_all(self) -> None:
        for container in await self.client.collect(api.CONTAINER_LIST, api.ListContainers(specs=False)):
            with suppress(NotFound):
                await self.client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id=container.id, force=True))

    async def follow(self) -> None:
        async for received in read_events(self.client.connection, start=1):
            self.events.append(received.event)

    def topics(self, id: str) -> list[str]:
        """The topics of one container's task events, in the order they came."""
        return [e.topic for e in self.events if e.id == id and e.topic.startswith("/tasks/")]

    async def topics_end(self, id: str, topic: str, seconds: float = 20.0) -> list[str]:
        """The same, once they end with `topic` and a moment has passed in which nothing else came."""
        deadline = time.monotonic() + seconds
        while not (topics := self.topics(id)) or topics[-1] != topic:
            assert time.monotonic() < deadline, f"{id}: {topics}"
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        return self.topics(id)

    def of_containers(self) -> list[str]:
        """What there is of this node's containers."""
        return of_containers(self.node)

    def left(self) -> list[str]:
        """The same, with processes and cgroups: what must be gone when the services are."""
        found = self.of_containers()
        found += [f"process {line}" for line in processes(str(self.directory))]
        for directory, names, _ in os.walk("/sys/fs/cgroup"):
            found += [f"cgroup {directory}/{name}" for name in names if self.namespace in name]
        return found


def of_containers(node: TestNode) -> list[str]:
    """What there is of a node's containers: mounts, bundles, shims, and what runc keeps."""
    found = [f"mount {path}" for path in mounts() if str(node.directory) in path]
    for name in ("bundles", "shims", "oci"):
        place = node.state / "runtime" / name
        found += [str(path) for path in place.glob("*" if name == "shims" else "*/*")]
    return found


@asynccontextmanager
async def runtime_node(
    directory: Path,
    natsd: NatsServer,
    *,
    copies: int = 1,
    others: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> AsyncIterator[RuntimeNode]:
    """The node while the block lasts; afterwards its containers are removed, and nothing of them is left.

    `arguments` are the runtime service's.
    """
    connection = await connect(natsd.address, name="test")
    client = Client(connection, "test-node", f"shoalrt{secrets.token_hex(4)}")
    test_node = TestNode(directory, natsd)
    node = RuntimeNode(directory, natsd, client, test_node)
    following = asyncio.create_task(node.follow())
    try:
        with test_node:
            test_node.start(*others)
            test_node.start(*["runtime"] * copies, arguments=tuple(arguments))
            try:
                yield node
            finally:
                if not any(s.running for s in test_node.services if s.name == "runtime"):
                    node.copy().start()
                await node.remove_all()
        deadline = time.monotonic() + 10
        while (left := node.left()) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert not left, "left behind:\n  " + "\n  ".join(left)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await connection.close()
