"""The FIFO `<state>/runtime/log`: each line that is written to it is one of the service's log.

Every bundle has a link to it where containerd's shims log to, so whoever looks for their log there (hooks, wrappers of
OCI runtimes) is heard; one descriptor does for all containers. A writer that opens it while no copy of the service runs
waits for one, as with containerd; several copies share the lines.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

NAME = "log"
_CHUNK = 1 << 16
"""A pipe's size: what is written at once (up to PIPE_BUF) is read at once."""
_LONGEST = 1 << 12


@contextmanager
def heard(state: Path) -> Iterator[None]:
    """Reads the FIFO in `state` for a block, in the running event loop."""
    path = state / NAME
    with suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    if not stat.S_ISFIFO(path.lstat().st_mode):
        path.unlink()
        os.mkfifo(path, 0o600)
    # For writing, too: no end of file, whoever comes and goes.
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    loop, lines = asyncio.get_running_loop(), Lines()
    try:
        loop.add_reader(fd, lambda: lines.take(_read(fd)))
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _read(fd: int) -> bytes:
    with suppress(BlockingIOError):  # another copy was faster
        return os.read(fd, _CHUNK)
    return b""


class Lines:
    """Logs what comes, line by line; a line that is longer than 4 KiB in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            for start in range(0, len(line), _LONGEST):
                log.info("shim.said", text=line[start : start + _LONGEST].decode(errors="replace"))
