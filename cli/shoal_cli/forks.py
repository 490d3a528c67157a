"""Forks of the node's process, which has everything loaded: what they let go of, and take instead.

It is forked in the middle of its event loop, which the fork never comes back to. Nothing of what the node holds is ever
closed by the collector there: a descriptor's number may be somebody else's by then.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
from pathlib import Path
from typing import TextIO, cast

import setproctitle

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
_KEPT_OPEN, _MOST_FDS = 3, 1 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)

_stamps: dict[str, int] = {}
"""When each of our files had been changed that is loaded, by its path."""


def load(*modules: str) -> None:
    """Loads what forks will want, once for all of them."""
    for module in modules:
        __import__(module)
    setproctitle.getproctitle()  # it finds its place while arguments and environment lie as the kernel put them
    ours = [found for name, found in sys.modules.items() if name.startswith("shoal_")]
    for file in (getattr(found, "__file__", None) for found in ours):
        if file:
            _stamps.setdefault(file, Path(file).stat().st_mtime_ns)
    gc.collect()
    gc.freeze()  # a collector that looked at it would have every fork copy its pages


def is_current() -> bool:
    """Whether the files are still those that were loaded: what is begun after an upgrade must be no mixture."""
    try:
        return all(Path(file).stat().st_mtime_ns == stamp for file, stamp in _stamps.items())
    except FileNotFoundError:
        return False


def let_go(*kept: int) -> None:
    """In a fork: the event loop, signal handlers, and descriptors but the standard ones and these, are the node's."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    asyncio._set_running_loop(None)
    gc.freeze()
    begin = _KEPT_OPEN
    for fd in sorted(kept):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, _MOST_FDS)


def take_streams(*streams: int, lines: bool) -> None:
    """Standard input, output and error are these from now on; output goes line by line, or in blocks.

    With the encoding that they have in this process.
    """
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    for fd in {fd for fd in streams if fd >= _KEPT_OPEN}:
        os.close(fd)
    encoding, errors = sys.stdin.encoding, sys.stdin.errors
    sys.stdin = _open(0, "r", -1, encoding, errors)
    sys.stdout = _open(1, "w", 1 if lines else -1, encoding, errors)
    sys.stderr = _open(2, "w", 1, encoding, sys.stderr.errors)


def _open(fd: int, mode: str, buffering: int, encoding: str, errors: str | None) -> TextIO:
    return cast(TextIO, open(fd, mode, buffering, encoding, errors, closefd=False))


def name(short: str, title: str) -> None:
    """What `ps` shows of this process: 15 characters as its name, and what fits as its command line."""
    setproctitle.setproctitle(title)
    _LIBC.prctl(PR_SET_NAME, short.encode(), 0, 0, 0)


def die_with(parent: int) -> None:
    """The kernel kills this process when the one that forked it, `parent`, has died."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
