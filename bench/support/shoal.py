"""A shoal node of its own, by `shoal up`, and one long-lived client of its bus."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from shoal_bus import node as nodes
from shoal_bus import subjects
from shoal_bus.api import content, snapshot
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.consumer import read_events
from shoal_bus.events import Event

from bench.support.side import Exited, Side

NODE = "bench"
TREE = Path(__file__).resolve().parents[2]
BINARY = TREE / "bin/shoal"
_START_SECONDS, _STOP_SECONDS = 60.0, 60.0


def installed() -> list[str]:
    """`bin/shoal`, as `make binaries` builds it, or the tree's own code where it hasn't since that was changed."""
    if BINARY.exists():
        built = BINARY.stat().st_mtime
        sources = (file for name in ("bus", "cli", "gateway", "services") for file in (TREE / name).glob("**/*.py"))
        if all(file.stat().st_mtime < built for file in sources):
            return [str(BINARY)]
    return [sys.executable, "-I", "-m", "shoal_cli"]


class Node:
    """A running `shoal up`: persistent files in `root`, the rest in `state`."""

    def __init__(self, root: Path, state: Path) -> None:
        self.root, self.state = root, state
        self.address = state / "containerd.sock"
        self.log = state / "node.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """For commands that are to find this node, and nothing else."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
        return kept | {"SHOAL_STATE": str(self.state)}

    def start(self) -> None:
        for directory in (self.root, self.state):
            directory.mkdir(parents=True, exist_ok=True)
        command = [*installed(), "up", "--node", NODE, "--stop-containers"]
        command += ["--root", str(self.root), "--state", str(self.state)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if b"node.up" in self.log.read_bytes():
                return
            time.sleep(0.05)
        raise RuntimeError(f"shoal up didn't start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextmanager
def running(root: Path, state: Path) -> Iterator[Node]:
    """The node for the length of a block."""
    node = Node(root, state)
    try:
        node.start()
        yield node
    finally:
        node.stop()


class Shoal(Side):
    """shoal by its bus. `parent` is the image's topmost snapshot."""

    name = "shoal"

    def __init__(self, node: Node, client: Client, mark: str) -> None:
        self.node, self.client, self.cgroup = node, client, mark
        self.parent = ""

    @classmethod
    @asynccontextmanager
    async def connect(cls, node: Node, mark: str) -> AsyncIterator[Shoal]:
        found = nodes.load(node.state)
        async with Client.open(found.address, found.name, mark, name="shoal-bench") as client:
            yield cls(node, client, mark)

    async def pull(self, reference: str) -> None:
        await self.client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=120)

    async def generated_spec(self, reference: str) -> dict[str, Any]:
        """What shoal generates for a run of an image, without a host name: the base of every container here."""
        await self.client.operate(api.TASK_RUN, api.RunTask(id="template", image=reference, args=["true"]), timeout=60)
        container = await self.client.call(api.CONTAINER_GET, api.GetContainer(id="template"))
        await self.task_wait("template")
        await self.client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id="template", force=True))
        return {key: value for key, value in container.spec.items() if key != "hostname"}

    async def snapshot_prepare(self, id: str) -> Any:
        request = snapshot.PrepareSnapshot(key=id, parent=self.parent)
        return (await self.client.call(snapshot.SNAPSHOT_PREPARE, request)).mounts

    async def container_create(self, id: str, args: list[str]) -> None:
        request = api.CreateContainer(
            id=id, runtime=self.runtime, spec=self.spec(id, args), snapshotter="overlayfs", snapshot_key=id
        )
        await self.client.call(api.CONTAINER_CREATE, request)

    async def task_create(self, id: str, mounts: Any) -> int:
        return (await self.client.call(api.TASK_CREATE, api.CreateTask(container_id=id, rootfs=mounts))).pid

    async def task_start(self, id: str) -> None:
        await self.client.call(api.TASK_START, api.ProcessRequest(container_id=id))

    async def task_wait(self, id: str) -> int:
        return (await self.client.call(api.TASK_WAIT, api.ProcessRequest(container_id=id), timeout=None)).exit_status

    async def task_kill(self, id: str) -> None:
        await self.client.call(api.TASK_KILL, api.KillTask(container_id=id, signal=signal.SIGKILL))

    async def task_delete(self, id: str) -> None:
        await self.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id))

    async def container_delete(self, id: str) -> None:
        await self.client.call(api.CONTAINER_DELETE, api.ContainerRequest(id=id))

    async def snapshot_remove(self, id: str) -> None:
        await self.client.call(snapshot.SNAPSHOT_REMOVE, snapshot.SnapshotRequest(key=id))

    async def exec_create(self, id: str, exec_id: str, args: list[str]) -> None:
        process = self.template["process"] | {"args": args}
        await self.client.call(api.TASK_EXEC, api.ExecTask(container_id=id, exec_id=exec_id, process=process))

    async def exec_start(self, id: str, exec_id: str) -> None:
        await self.client.call(api.TASK_START, api.ProcessRequest(container_id=id, exec_id=exec_id))

    async def exec_wait(self, id: str, exec_id: str) -> int:
        request = api.ProcessRequest(container_id=id, exec_id=exec_id)
        return (await self.client.call(api.TASK_WAIT, request, timeout=None)).exit_status

    async def exec_delete(self, id: str, exec_id: str) -> None:
        await self.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id, exec_id=exec_id))

    @asynccontextmanager
    async def events(self, service: str, topic: str) -> AsyncIterator[AsyncIterator[tuple[float, Event]]]:
        """The events of one topic from now on, each with when it came (CLOCK_MONOTONIC, in seconds)."""
        pattern = subjects.event_pattern(NODE, self.client.namespace, service, topic)
        # From a time, so that nothing is missed while the server makes the consumer.
        since = datetime.now(UTC)
        async with aclosing(read_events(self.client.connection, [pattern], since=since)) as received:

            async def told() -> AsyncIterator[tuple[float, Event]]:
                async for one in received:
                    yield time.monotonic(), one.event

            yield told()

    @asynccontextmanager
    async def exits(self) -> AsyncIterator[AsyncIterator[Exited]]:
        async with self.events("runtime", "/tasks/exit") as events:

            async def told() -> AsyncIterator[Exited]:
                async for received, event in events:
                    exit = api.TaskExited.of(event.payload)
                    yield Exited(exit.container_id, "" if exit.id == exit.container_id else exit.id, received)

            yield told()

    def supervisors(self) -> list[int]:
        return sorted(set(self._all()) - set(self.services()))

    def services(self) -> list[int]:
        up = psutil.Process(self.node.pid)
        return [up.pid, *(child.pid for child in up.children(recursive=True))]

    def bus(self) -> list[int]:
        """The nats-server among the services."""
        return [pid for pid in self.services() if psutil.Process(pid).name() == "nats-server"]

    def _all(self) -> list[int]:
        """Every process that says in its command line that it is of this node: shims and their zygote."""
        state = str(self.node.state)
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            words = process.info["cmdline"] or []
            if any(state in word for word in words) and process.info["pid"] != os.getpid():
                found.append(int(process.info["pid"]))
        return found
