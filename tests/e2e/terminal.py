"""A person at a terminal: the `shoal` command on a pseudo-terminal that is its controlling one (pty(7))."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from typing import Any, Self

from tests.e2e.shoal import COMMAND, Shoal

PATIENCE_SECONDS = 40.0

Modes = list[Any]


class Terminal:
    """A pseudo-terminal with one command on it, as it would be in a window: resized, typed at, hung up."""

    def __init__(
        self,
        node: Shoal,
        *arguments: str,
        rows: int = 24,
        columns: int = 80,
        command: Sequence[str] = COMMAND,
        **options: Any,
    ) -> None:
        self.shown = b""
        """All that has appeared so far."""
        self._seen = 0
        self._master, self._slave = pty.openpty()
        self.resize(rows, columns)
        self.before = self.modes
        streams = {"stdin": self._slave, "stdout": self._slave, "stderr": self._slave} | options
        # It leads a session whose controlling terminal this is, and so hears of its resizing and hanging up.
        self.process = subprocess.Popen(["setsid", "--ctty", *command, *arguments], env=node.environment, **streams)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.hang_up()

    @property
    def modes(self) -> Modes:
        """Its settings (termios(3))."""
        return termios.tcgetattr(self._slave)

    @property
    def is_raw(self) -> bool:
        return not self.modes[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def resize(self, rows: int, columns: int) -> None:
        """As dragging a window's corner does: the kernel tells whose terminal it is."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        while keys:
            keys = keys[os.write(self._master, keys) :]

    def until(self, text: bytes, seconds: float = PATIENCE_SECONDS) -> bytes:
        """What has appeared since the last time, up to and with `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.shown[self._seen :]:
            assert self._read(deadline - time.monotonic()), f"no {text!r} in {self.shown[self._seen :]!r}"
        begin, self._seen = self._seen, self.shown.index(text, self._seen) + len(text)
        return self.shown[begin : self._seen]

    def until_raw(self) -> None:
        """Waits for raw mode: what is typed from now on is the container's."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.is_raw:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.rest()!r}"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ends(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The command's exit status, once it has ended and all its output is in `shown`."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it goes on: {self.shown[-500:]!r}"
            self._read(0.02)
        while self._read(0):
            pass
        return self.process.returncode

    def rest(self) -> bytes:
        """What has appeared since the last time."""
        while self._read(0):
            pass
        begin, self._seen = self._seen, len(self.shown)
        return self.shown[begin:]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def hang_up(self) -> None:
        """Closes the window."""
        for name in ("_master", "_slave"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, seconds))[0]:
            return False
        data = os.read(self._master, 1 << 16)
        self.shown += data
        return bool(data)
