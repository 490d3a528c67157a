"""The processes below a test, from /proc: who they are, whose children, and a signal that reaches nobody else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One process as it was when it was looked at. `started` tells it from a later one of the same pid."""

    pid: int
    parent: int
    name: str
    state: str
    started: int

    @property
    def arguments(self) -> list[str]:
        """Its command line; empty once it has none."""
        try:
            return [part.decode(errors="replace") for part in _read(self.pid, "cmdline").split(b"\0")[:-1]]
        except OSError:
            return []

    @property
    def cgroups(self) -> list[str]:
        """The paths of its cgroups."""
        try:
            return [line.split(":", 2)[2] for line in _read(self.pid, "cgroup").decode().splitlines()]
        except OSError:
            return []

    @property
    def is_zombie(self) -> bool:
        return self.state in "ZX"

    def signal(self, number: int = signal.SIGKILL) -> bool:
        """Sends it a signal, and says whether it was still there to get it."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            now = look(self.pid)
            if now is None or now.started != self.started or now.is_zombie:
                return False
            signal.pidfd_send_signal(fd, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)

    def __str__(self) -> str:
        return f"{self.pid} ({self.name}, {self.state}, child of {self.parent}): {' '.join(self.arguments)[:300]}"


def look(pid: int) -> Entry | None:
    """One process, or None where there is none (proc(5), /proc/pid/stat)."""
    try:
        text = _read(pid, "stat").decode(errors="replace")
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return Entry(pid, int(fields[1]), head.partition("(")[2], fields[0], int(fields[19]))


def table() -> dict[int, Entry]:
    """Every process of the machine."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {entry.pid: entry for entry in map(look, pids) if entry is not None}


def below(root: int, entries: Iterable[Entry] | None = None) -> list[Entry]:
    """The children of a process, theirs, and so on."""
    children: dict[int, list[Entry]] = {}
    for entry in table().values() if entries is None else entries:
        children.setdefault(entry.parent, []).append(entry)
    found: list[Entry] = []
    pending = [root]
    while pending:
        of_one = children.get(pending.pop(), [])
        found += of_one
        pending += [entry.pid for entry in of_one]
    return found


def _read(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()
