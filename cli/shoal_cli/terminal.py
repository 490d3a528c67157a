"""Our terminal in raw mode while a container's terminal is behind it, and back whatever happens."""

from __future__ import annotations

import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shoal_bus.api.runtime import ConsoleSize
from shoal_bus.errors import FailedPrecondition


def needed(otherwise: str = "leave out -t, or run it from a terminal") -> None:
    """FAILED_PRECONDITION unless our standard input is a terminal; `otherwise` is the mend."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise FailedPrecondition("standard input is not a terminal", hint=otherwise)


@contextmanager
def raw() -> Iterator[None]:
    """Raw mode for a block: every key, Ctrl-C included, is the container's."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        # In the background by now, we would be stopped for touching it (termios(3), SIGTTOU).
        ignored = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with suppress(termios.error):  # it has hung up
            termios.tcsetattr(fd, termios.TCSANOW, before)
        signal.signal(signal.SIGTTOU, ignored)


def size() -> ConsoleSize | None:
    """Its size, or None where it has none that it knows, or isn't there."""
    try:
        found = os.get_terminal_size(sys.stdin.fileno())
    except (OSError, ValueError, AttributeError):  # no terminal; closed; none at all
        return None
    return ConsoleSize(width=found.columns, height=found.lines) if found.columns and found.lines else None


def kind() -> str:
    """What TERM says it is."""
    return os.environ.get("TERM", "") or "xterm"
