"""Out of memory: hears from the kernel when it kills a process of a container for its memory limit.

cgroup v1 tells an eventfd(2) (kernel documentation, cgroup-v1/memory.rst, "OOM Control"); cgroup v2 makes
`memory.events` readable out of band (cgroup-v2.rst, "Memory Interface Files"). What counts is `oom_kill` in either.
"""

from __future__ import annotations

import os
import select

from shoal_runtime.shim.loop import Loop
from shoal_runtime.shim.reaper import Handover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class OomWatch:
    """Calls `told` with the number of OOM kills so far in a memory cgroup, whenever that has risen."""

    def __init__(self, loop: Loop, told: Callable[[int], None]) -> None:
        self._loop, self._told = loop, told
        self.kills = 0
        self._file = self._event = -1

    def leave_to(self, handover: Handover) -> dict[str, Any]:
        """What `restore` takes."""
        event = handover.keep(self._event, select.POLLIN) if self._event >= 0 else -1
        unified = self._file >= 0 and self._event < 0
        file = handover.keep(self._file, select.POLLPRI if unified else 0) if self._file >= 0 else -1
        return {"kills": self.kills, "event": event, "file": file}

    def restore(self, state: dict[str, Any], fds: Sequence[int]) -> None:
        """Goes on where another worker stopped."""
        self.kills = state["kills"]
        self._event = fds[state["event"]] if state["event"] >= 0 else -1
        self._file = fds[state["file"]] if state["file"] >= 0 else -1
        self._listen()

    def _listen(self) -> None:
        if self._event >= 0:
            self._loop.watch(self._event, select.POLLIN, self._woken)
        elif self._file >= 0:
            self._loop.watch(self._file, select.POLLPRI, self._woken)

    def follow(self, found: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Begins, with the memory cgroup among those of a process (`cgroups.of`); without one nothing is told."""
        try:
            directory, unified = _of_memory(found)
            if not directory:
                return
            name = "memory.events" if unified else "memory.oom_control"
            self._file = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            if unified:
                self._listen()
                return
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            control = os.open(f"{directory}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(control, f"{self._event} {self._file}".encode())
            finally:
                os.close(control)
            self._listen()
        except OSError:
            self.close()  # no memory controller, or the process is gone already: nothing to hear

    def _woken(self, _: int) -> None:
        if self._event >= 0:
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                pass
        self.look()

    def look(self) -> None:
        """Reads the count now: before an exit is told, an OOM kill that led to it is."""
        if self._file < 0:
            return
        try:
            text = os.pread(self._file, 1024, 0).decode("ascii")
        except OSError:
            self.close()  # the cgroup has been removed
            return
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and int(value) > self.kills:
                self.kills = int(value)
                self._told(self.kills)

    def close(self) -> None:
        for name in ("_event", "_file"):
            fd = getattr(self, name)
            if fd >= 0:
                self._loop.forget(fd)
                os.close(fd)
                setattr(self, name, -1)


def _of_memory(found: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, bool]:
    """The directory of the memory cgroup, and whether it is cgroup v2's; empty where there is none."""
    for directory, controllers in found:
        if "memory" in controllers:
            return directory, False
    for directory, controllers in found:
        if not controllers and os.path.exists(f"{directory}/memory.events"):
            return directory, True
    return "", False
