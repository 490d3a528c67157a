"""The kernel's grace period before a process's move into a cgroup, begun before an OCI runtime waits for it.

Moving a process between cgroups takes a lock that is cheap to hold for reading, at every fork and exit, and dear to
take for writing: after a quiet moment the writer first waits for an RCU grace period, 8 ms on a machine with 2 cores,
a third of what runc's `create` takes. Once one writer has been there, the next ones don't wait for some milliseconds.
So a write that changes nothing, this process's move into the cgroup that it is in, is made while the shim is forked and
the runtime loaded. (Linux, kernel/cgroup/cgroup.c, `cgroup_attach_lock`; kernel/rcu/sync.c. The mount option
`favordynmods` spares everybody the wait, for dearer forks.)
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from shoal_runtime.shim import cgroups


class GracePeriod:
    """Begun whenever a container's process is about to be made. Without a cgroup to write to, nothing happens."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "grace-period")
        self._begun: Future[None] | None = None

    def begin(self) -> None:
        """Returns at once; one that is under way is enough."""
        if self._begun is None or self._begun.done():
            self._begun = self._thread.submit(_move_to_where_we_are)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)


def _move_to_where_we_are() -> None:
    with suppress(OSError):
        for directory in cgroups.of_this_process():
            fd = os.open(Path(directory, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"0")
            finally:
                os.close(fd)
            return
