"""Our terminal in raw mode while a container's terminal is behind it, and back whatever happens."""

from __future__ import annotations

import os
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raw() -> Iterator[None]:
    """Raw mode for a block: every key, Ctrl-C included, is the container's."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)


def window() -> tuple[int, int]:
    """Its width and height in characters."""
    size = os.get_terminal_size(sys.stdin.fileno())
    return size.columns, size.lines
