"""Whole lives of containers, one after another, while parts of their node are killed; every answer is checked.

What wasn't hurt must come out as if nothing had been. What was hurt may fail where it was hit, with the canonical code,
and is then as if it hadn't been tried: a container whose shim or process was killed has ended with 137.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar

from shoal_bus.api import runtime as api
from shoal_bus.api import snapshot
from shoal_bus.errors import Aborted, DeadlineExceeded, FailedPrecondition, NotFound, ShoalError, Unavailable
from shoal_bus.message import Message, Request
from shoal_bus.types import Mount, Stdio
from shoal_bus.verb import Verb
from shoal_bus.wire import new_id
from shoal_runtime.shim.mounts import mount_all, unmount_all

from tests.support import bundle as bundles
from tests.support.leaks import cgroups_of, mounts
from tests.support.ledger import Told
from tests.support.runtime import RuntimeNode

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)

KILLED = 137
_TRANSIENT = (Unavailable, DeadlineExceeded, Aborted)
"""Errors that say nothing about a request: its client repeats it under the same id (architecture.md, "The bus")."""
_SECONDS = 60.0


class Life:
    """One container's: `hurt` says whether anything of it has been killed by now."""

    def __init__(
        self, node: RuntimeNode, id: str, chance: random.Random, hurt: Callable[[str], bool], parent: str
    ) -> None:
        self._node, self.id, self._chance, self._hurt, self._parent = node, id, chance, hurt, parent
        self.told = Told(id)
        self._output = node.directory / f"{id}.out"
        self._terminal = chance.random() < 0.2
        self._cut_short = False
        """Whether we ourselves may have ended it before it had said its word."""

    async def lead(self) -> None:
        """From nothing to nothing."""
        short = self._chance.random() < 0.4
        self._cut_short = not short
        status = self._chance.randrange(1, 100)
        command = f"echo of {self.id}; exit {status}" if short else f"echo of {self.id}; exec sleep 600"
        os.mkfifo(self._output)
        reader = os.open(self._output, os.O_RDONLY | os.O_NONBLOCK)
        try:
            await self._make(command)
            if not short and self._chance.random() < 0.15:
                status = KILLED  # removed without ever having been started
            elif await self._start() and not short:
                if self._chance.random() < 0.3:  # about when its shim goes to rest
                    await asyncio.sleep(self._chance.uniform(0.8, 1.6))
                await asyncio.gather(*(self._exec(number) for number in range(self._chance.randrange(3))))
                status = await self._end()
            await self._finish(status, short)
            self._read(reader)
        finally:
            os.close(reader)
            self._output.unlink()

    # ------------------------------------------------------------------------------------------------------------ steps

    async def _make(self, command: str) -> None:
        spec = bundles.spec(["sh", "-c", command], terminal=self._terminal)
        spec["linux"]["cgroupsPath"] = f"/{self._node.namespace}/{self.id}"
        await self._ask(api.CONTAINER_CREATE, api.CreateContainer(id=self.id, spec=spec))
        stdio = Stdio(stdout=str(self._output), terminal=self._terminal)
        create = api.CreateTask(container_id=self.id, rootfs=await self._rootfs(), stdio=stdio)
        while (task := await self._try(api.TASK_CREATE, create, FailedPrecondition)) is None:
            await self._is_not_there()
            self._nothing_left()
        assert task.status == "created" or (task.status == "stopped" and self._hurt(self.id)), task
        self.told.pid = task.pid

    async def _rootfs(self) -> list[Mount]:
        if not self._parent:
            return bundles.bind(self._node.rootfs)
        verb = snapshot.SNAPSHOT_PREPARE.on("overlayfs")
        return (await self._ask(verb, snapshot.PrepareSnapshot(key=self.id, parent=self._parent))).mounts

    async def _start(self) -> bool:
        task = await self._try(api.TASK_START, self._process(), FailedPrecondition, NotFound)
        if task is not None:
            assert task.pid == self.told.pid, task
            assert task.status in ("running", "stopped"), task
        self.told.started = task is not None
        return self.told.started

    async def _exec(self, number: int) -> None:
        exec_id = f"{self.id}-e{number}"
        ends = self._chance.random() < 0.7
        status = self._chance.randrange(100)
        request = api.ExecTask(
            container_id=self.id, exec_id=exec_id, start=True,
            args=["sh", "-c", f"exit {status}"] if ends else ["sleep", "600"],
        )  # fmt: skip
        task = await self._try(api.TASK_EXEC, request, FailedPrecondition, NotFound)
        if task is None:
            await self._is_not_there(exec_id)
            return
        self.told.execs[exec_id] = task.pid
        if ends:
            exit = await self._wait(exec_id)
            self._right(exit, status)
            assert exit.pid == task.pid
            self.told.exec_exits[exec_id] = exit
            if self._chance.random() < 0.5:
                deleted = await self._ask(api.TASK_DELETE, api.DeleteTask(container_id=self.id, exec_id=exec_id))
                assert deleted == exit
                await self._is_not_there(exec_id)

    async def _end(self) -> int:
        """Has a task that would run for long end, or leaves that to its removal."""
        if self._chance.random() < 0.25:
            await self._try(api.TASK_PAUSE, api.TaskRequest(container_id=self.id), FailedPrecondition, NotFound)
        if self._chance.random() < 0.7:
            await self._try(api.TASK_KILL, api.KillTask(container_id=self.id, signal=9), NotFound)
            self._right(await self._wait(), KILLED)
        return KILLED

    async def _finish(self, status: int, ends: bool) -> None:
        """Waits for one that ends by itself, and removes the task and the container: nothing is left of them."""
        waited = await self._wait() if self.told.started and ends else None
        exit = await self._ask(api.TASK_DELETE, api.DeleteTask(container_id=self.id, force=True))
        assert waited in (None, exit), f"{waited} is not {exit}"
        assert exit.pid == self.told.pid, exit
        self._right(exit, status)
        self.told.exit = exit
        self._nothing_left()
        await self._is_not_there()
        await self._ask(api.CONTAINER_DELETE, api.ContainerRequest(id=self.id))
        if self._parent:
            await self._ask(snapshot.SNAPSHOT_REMOVE.on("overlayfs"), snapshot.SnapshotRequest(key=self.id))

    # -------------------------------------------------------------------------------------------------------- questions

    def _process(self, exec_id: str = "") -> api.ProcessRequest:
        return api.ProcessRequest(container_id=self.id, exec_id=exec_id)

    async def _wait(self, exec_id: str = "") -> api.Exit:
        return await self._ask(api.TASK_WAIT, self._process(exec_id))

    def _right(self, exit: api.Exit, status: int) -> None:
        allowed = {status, KILLED} if self._hurt(self.id) else {status}
        assert exit.exit_status in allowed, f"{exit} instead of {allowed}"

    async def _is_not_there(self, exec_id: str = "") -> None:
        try:
            task = await self._ask(api.TASK_GET, self._process(exec_id))
        except NotFound:
            return
        raise AssertionError(f"still there: {task}")

    def _nothing_left(self) -> None:
        """Of a task that is gone: no mount, no bundle, nothing of the OCI runtime's, no cgroup."""
        state, namespace = self._node.node.state / "runtime", self._node.namespace
        places = [state / "bundles" / namespace / self.id, state / "oci" / namespace / self.id]
        left = [str(place) for place in places if place.exists()]
        left += [f"mount {point}" for point in mounts() if point.startswith(tuple(f"{place}/" for place in places))]
        left += [str(place) for place in cgroups_of(f"{namespace}/{self.id}")]
        assert not left, f"left behind: {left}"

    def _read(self, reader: int) -> None:
        """Its output, to the end: reading would block if anybody had the FIFO open for writing still."""
        data = b""
        while chunk := os.read(reader, 65536):
            data += chunk
        said = f"of {self.id}".encode() + (b"\r\n" if self._terminal else b"\n")
        wanted = [said] if self.told.started and not self._hurt(self.id) and not self._cut_short else [said, b""]
        assert data in wanted, data

    async def _ask(self, verb: Verb[Req, Rep], request: Req) -> Rep:
        """One request, repeated under its id as long as its errors say nothing about it."""
        answer = await self._try(verb, request)
        assert answer is not None
        return answer

    async def _try(self, verb: Verb[Req, Rep], request: Req, *allowed: type[ShoalError]) -> Rep | None:
        """The same; None where it fails in a way that a container that was hurt may."""
        id = new_id()
        ends = asyncio.get_running_loop().time() + _SECONDS
        while True:
            try:
                answer = await self._node.client.call(verb, request, id=id, timeout=_SECONDS, patience=_SECONDS)
            except ShoalError as error:
                now = asyncio.get_running_loop().time()
                self.told.answers.append(f"{now:.3f} {verb.name} {error.code.name} {error}")
                if isinstance(error, _TRANSIENT) and now < ends:
                    await asyncio.sleep(0.05)
                    continue
                if isinstance(error, allowed) and self._hurt(self.id):
                    return None
                raise
            self.told.answers.append(f"{asyncio.get_running_loop().time():.3f} {verb.name} {answer!r:.300}")
            return answer


async def committed_busybox(node: RuntimeNode) -> str:
    """A committed snapshot with busybox in it, for containers to have theirs on top of."""
    prepare = snapshot.PrepareSnapshot(key="base-active")
    made = await node.client.call(snapshot.SNAPSHOT_PREPARE.on("overlayfs"), prepare)
    with tempfile.TemporaryDirectory(dir=node.directory) as point:
        mount_all([mount.model_dump() for mount in made.mounts], point)
        try:
            shutil.copytree(node.rootfs, point, symlinks=True, dirs_exist_ok=True)
        finally:
            unmount_all(point)
    commit = snapshot.CommitSnapshot(name="base", key="base-active")
    await node.client.call(snapshot.SNAPSHOT_COMMIT.on("overlayfs"), commit)
    return "base"


def describe(lives: Sequence[Life], kills: dict[str, list[str]]) -> str:
    """What is known of lives that went wrong."""
    parts = []
    for life in lives:
        parts += [f"{life.id}: answers", *life.told.answers, "  killed", *kills.get(life.id, [])]
    return "\n    ".join(parts)
