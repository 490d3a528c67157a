"""What we say on standard error, whatever has become of it."""

from __future__ import annotations

import os
import sys
import termios


def tell(text: str) -> None:
    """Writes `text` to standard error. Where that is gone (a terminal that hung up), nobody hears it: no error."""
    try:
        sys.stderr.write(text.replace("\n", "\r\n") if _is_raw(2) else text)
        sys.stderr.flush()
    except OSError:
        # What is still buffered is written at exit, and would change our exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 2)


def _is_raw(fd: int) -> bool:
    """Whether it is a terminal that goes down a line, and not back to its beginning by itself."""
    try:
        return not termios.tcgetattr(fd)[1] & termios.OPOST
    except termios.error:
        return False


def open_missing() -> None:
    """Has /dev/null for each standard stream that we were started without.

    Whatever is opened next would take its place, and be read and written as if it were that stream.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (for good)
