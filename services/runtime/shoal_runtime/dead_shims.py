"""What dead shims leave: their containers are taken down, their exits told, and their directories removed."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from shoal_bus.errors import Unavailable
from shoal_bus.locks import Locks

from shoal_runtime.shim import protocol
from shoal_runtime.shims import ExitRecord, exit_record
from shoal_runtime.takedown import KILLED, is_alive, remove_container

log = structlog.get_logger(__name__)


class DeadShims:
    """Undoes what they left in `places`, one copy of the service at a time; `on_exit` is told of each exit."""

    def __init__(self, places: Path, locks: Locks, on_exit: Callable[[ExitRecord], None]) -> None:
        self._places, self._locks, self._on_exit = places, locks, on_exit

    async def take_down(self, name: str) -> ExitRecord | None:
        """What a dead shim left: its container is killed, its rootfs unmounted, the exit told (137, if unrecorded)."""
        place = str(self._places / name)
        async with self._locks.hold(f"shim {name}"):
            record = protocol.read_json(place, protocol.RECORD)
            if record is None:
                return None
            if await asyncio.to_thread(is_alive, place):
                # Another copy has had it made anew meanwhile, or it is stuck: whoever asks again finds out.
                raise Unavailable(f"container {record['id']}: its shim is alive, and doesn't answer")
            exit = protocol.read_json(place, protocol.EXIT)
            if exit is None or not exit.get("taken_down"):
                why = (protocol.read_json(place, protocol.LAST_WORD) or {}).get("why", "killed")
                log.warning(
                    "shim.dead", namespace=record["namespace"], container=record["id"], exited=exit is not None, why=why
                )
                exit = await asyncio.to_thread(remove_container, place, record, exit)
                protocol.write_durably(place, protocol.EXIT, exit)
            execs = list(_execs_of(place, exit))  # before another copy may remove the directory
        taken = exit_record(record["namespace"], record["id"], exit)
        for exec_id, ended in execs:
            self._on_exit(exit_record(taken.namespace, taken.id, ended, exec_id))
        if taken.pid:
            self._on_exit(taken)  # without a pid there never was a process that could exit
        return taken

    async def sweep(self, name: str) -> None:
        """Removes a dead shim's directory: at once, and not while another copy takes down what it stands for."""
        if not (self._places / name).exists():
            return
        async with self._locks.hold(f"shim {name}"):
            away = self._places / f"{name}.{os.getpid()}"
            with suppress(FileNotFoundError):
                (self._places / name).rename(away)
            await asyncio.to_thread(shutil.rmtree, away, True)

    async def sweep_group(self, group: str) -> None:
        """Removes the directory of a group whose shim is dead."""
        async with self._locks.hold(f"shim-group {group}"):
            try:
                protocol.connect(str(self._places / (group + protocol.GROUP)), protocol.SOCKET).close()
            except OSError:
                await self.sweep(group + protocol.GROUP)  # nobody has begun it anew

    async def sweep_half_made(self, name: str = "") -> None:
        """Removes what those left (of the container `name`, or of any) who died making a directory, or removing one."""
        for place in self._places.glob(f"{name}*.*"):
            maker = place.suffix.removeprefix(".")
            if maker.isdigit() and not protocol.start_time(int(maker)):
                await asyncio.to_thread(shutil.rmtree, place, True)


def _execs_of(place: str, exit: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """How the execs ended that a dead shim had started: as it had recorded, or with their container."""
    for name in sorted(entry.name for entry in Path(place).iterdir()):
        if name.startswith(protocol.EXEC) and name.endswith(".json"):
            record = protocol.read_json(place, name) or {}
            killed = {"exit_status": KILLED, "exited_at": exit["exited_at"]}
            yield name.removeprefix(protocol.EXEC).removesuffix(".json"), killed | record
