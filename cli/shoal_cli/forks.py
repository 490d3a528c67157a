"""Forks of the node's process, which has everything loaded: what is loaded for them, and what they take instead."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TextIO, cast

import setproctitle
from shoal_bus import forks

_KEPT_OPEN = 3

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
    forks.name(short)
