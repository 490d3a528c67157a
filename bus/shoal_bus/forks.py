"""What a fork of a process with an event loop lets go of: the loop is never come back to.

Nothing of what the forking process holds is ever closed by the collector there: a descriptor's number may be somebody
else's by then.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import gc
import os
import signal
import stat
import termios
from collections.abc import Sequence
from contextlib import suppress

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
_KEPT_OPEN, _MOST_FDS = 3, 1 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)


def let_go(*kept: int, ignored: Sequence[int] = ()) -> None:
    """In a fork: event loop, signal handlers, and descriptors but the standard ones and these, are its parent's.

    Signals that are `ignored` are so from the beginning.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else usual)
    asyncio._set_running_loop(None)
    gc.freeze()
    begin = _KEPT_OPEN
    for fd in sorted({*kept, *_libuvs_own()}):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, _MOST_FDS)


def _libuvs_own() -> list[int]:
    """Both ends of a pipe that libuv has just made for this fork, and that holds the byte which says so.

    In every fork of this one it closes them, by their numbers, and makes another: they mustn't be somebody else's then.
    """
    pipes: dict[tuple[int, int], list[int]] = {}
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 (numbers)
        with suppress(OSError):  # the one that lists them
            status = os.fstat(fd)
            if stat.S_ISFIFO(status.st_mode):
                pipes.setdefault((status.st_dev, status.st_ino), []).append(fd)
    return [fd for ends in pipes.values() if len(ends) == 2 and _waiting(min(ends)) == 1 for fd in ends]


def _waiting(fd: int) -> int:
    """How many bytes there are to be read from a pipe."""
    count = ctypes.c_int()
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count.value


def die_with(parent: int) -> None:
    """The kernel kills this process when the one that forked it, `parent`, has died."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def name(short: str) -> None:
    """What `ps` shows as this process's name: 15 characters."""
    _LIBC.prctl(PR_SET_NAME, short.encode(), 0, 0, 0)
