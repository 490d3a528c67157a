"""Shims of a test's own, as a copy of the runtime service has them."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from shoal_bus.locks import Locks
from shoal_bus.types import Stdio
from shoal_runtime.shim import protocol
from shoal_runtime.shims import ExitRecord, place_of
from shoal_runtime.supervisor import Supervisor

from tests.support import bundle as bundles

SECONDS = 30.0


class Host:
    """A supervisor as a copy of the runtime service has it, and the exits it heard of."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.state = directory, directory / "state"
        self.state.mkdir(exist_ok=True)
        self.rootfs = bundles.busybox_rootfs(directory / "rootfs")
        self.exits: list[ExitRecord] = []
        self.ooms: list[tuple[str, int]] = []
        self.supervisor = self._new()

    def _new(self) -> Supervisor:
        return Supervisor(
            self.state,
            Locks(self.directory / "locks"),
            self.exits.append,
            lambda _, id, kills: self.ooms.append((id, kills)),
        )

    def another(self) -> Host:
        """Another copy of the service, on the same containers."""
        other = copy.copy(self)
        other.exits, other.ooms = [], []
        other.supervisor = other._new()
        return other

    async def restart(self) -> list[Any]:
        """As after the service was killed and started again."""
        await self.supervisor.close()
        self.supervisor = self._new()
        return await self.supervisor.start()

    async def create(
        self,
        id: str,
        args: list[str],
        *,
        stdio: Stdio | None = None,
        runtime: str = "runc",
        linux: dict[str, Any] | None = None,
        **process: Any,
    ) -> int:
        stdio = stdio or Stdio()
        spec = bundles.spec(args, terminal=stdio.terminal, **process)
        spec["linux"] |= linux or {}
        place = bundles.bundle(self.directory / "bundles" / id, spec)
        return await self.supervisor.create(
            "test",
            id,
            bundle=place,
            rootfs=bundles.bind(self.rootfs),
            runtime=runtime,
            stdio=stdio,
            request_id=f"r-{id}",
        )

    async def run(self, id: str, args: list[str], **more: Any) -> int:
        pid = await self.create(id, args, **more)
        await self.supervisor.start_task("test", id)
        return pid

    async def exit_of(self, id: str) -> ExitRecord:
        async with asyncio.timeout(20):
            while not (found := [e for e in self.exits if e.id == id]):
                await asyncio.sleep(0.01)
        return found[0]

    async def delete(self, id: str, *, force: bool = False) -> ExitRecord | None:
        return await self.supervisor.delete("test", id, force)

    def shim_pid(self, id: str) -> int:
        record = protocol.read_json(str(self.state / "shims" / place_of("test", id)), protocol.RECORD)
        assert record is not None
        return int(record["pid"])

    def processes(self, id: str) -> list[str]:
        """The names of the shim's own processes: the reaper's, and its worker's where there is one."""
        reaper = psutil.Process(self.shim_pid(id))
        names = [reaper.name()]
        for child in reaper.children():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                names.append(child.name())
        return sorted(name for name in names if name.startswith("shoal-"))

    async def idle(self, id: str) -> None:
        """Returns once the shim has no worker."""
        await until(lambda: self.processes(id) == ["shoal-shim"])


async def until(is_so: Callable[[], bool]) -> None:
    """Returns once something is so."""
    async with asyncio.timeout(SECONDS):
        while not is_so():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running_host(directory: Path) -> AsyncIterator[Host]:
    """A host while the block lasts; then every container is removed."""
    started = Host(directory)
    await started.supervisor.start()
    yield started
    for place in (started.state / "shims").iterdir():
        record = protocol.read_json(str(place), protocol.RECORD)
        if record is not None:
            await started.delete(record["id"], force=True)
    await started.supervisor.close()


def reader_of(fifo: Path) -> tuple[threading.Thread, list[int]]:
    """Reads a FIFO to its end on a thread; the list then has the number of bytes."""
    counted: list[int] = []

    def read() -> None:
        total = 0
        with fifo.open("rb", buffering=0) as file:
            while data := file.read(1 << 20):
                total += len(data)
        counted.append(total)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, counted
