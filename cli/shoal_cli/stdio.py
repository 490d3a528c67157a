"""An attached container's standard streams: FIFOs in a directory of our own, copied from and to our own streams.

All of them are open before the container is asked for, so that its first byte finds a reader. Its last byte is there
when it has exited: what is in the pipes then is copied to the end before we say so.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Stdio

_CHUNK = 1 << 16
_QUIET_SECONDS = 0.5
"""After the exit, a stream somebody still holds open is at its end when nothing came for so long."""
_LONGEST_SECONDS = 10.0


class Streams:
    """The FIFOs of one container, for the length of a block. `stdio` is what to ask the runtime for."""

    def __init__(self, *, stdin: bool, terminal: bool) -> None:
        self._terminal = terminal
        self._with_stdin = stdin
        self._stack = ExitStack()
        self._outputs: list[_Output] = []
        self._stdin_fd = -1
        self._hold_fd = -1
        self._pump: asyncio.Task[None] | None = None
        self.stdio = Stdio()
        self.unwanted = asyncio.Event()
        """Set when who reads our output has gone."""

    def __enter__(self) -> Self:
        try:
            directory = Path(tempfile.mkdtemp(prefix="shoal-run-"))
            self._stack.callback(shutil.rmtree, directory)
            paths = {}
            if self._with_stdin:
                paths["stdin"] = str(self._open_input(directory / "stdin"))
            paths["stdout"] = str(self._open_output(directory / "stdout", 1))
            if not self._terminal:
                paths["stderr"] = str(self._open_output(directory / "stderr", 2))
            self.stdio = Stdio(terminal=self._terminal, **paths)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open_input(self, path: Path) -> Path:
        os.mkfifo(path, 0o600)
        # Opened for both, so that it opens without a reader, and then for writing alone; the first one holds what we
        # write until the container has it open.
        self._hold_fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stack.callback(self._close_hold)
        self._stdin_fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stack.callback(self._close_stdin)
        return path

    def _open_output(self, path: Path, target: int) -> Path:
        os.mkfifo(path, 0o600)
        output = _Output(path, target, self.unwanted)
        self._stack.callback(output.close)
        self._outputs.append(output)
        return path

    def _close_hold(self) -> None:
        if self._hold_fd >= 0:
            os.close(self._hold_fd)
            self._hold_fd = -1

    def _close_stdin(self) -> None:
        if self._stdin_fd >= 0:
            os.close(self._stdin_fd)
            self._stdin_fd = -1

    def started(self, end_input: Callable[[], Awaitable[None]]) -> None:
        """The container runs: begins to copy. `end_input` is called when our input ends, unless it is a terminal."""
        for output in self._outputs:
            output.begin()
        self._close_hold()
        if self._with_stdin:
            self._pump = asyncio.create_task(self._copy_stdin(end_input))

    async def finish(self) -> None:
        """The container has exited: copies what is still on its way."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        await asyncio.gather(*(output.finish() for output in self._outputs))

    async def _copy_stdin(self, end_input: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        source = sys.stdin.fileno()
        try:
            while True:
                await _readable(loop, source)
                data = os.read(source, _CHUNK)
                if not data:
                    self._close_stdin()
                    if not self._terminal:
                        await end_input()
                    return
                while data:
                    try:
                        data = data[os.write(self._stdin_fd, data) :]
                    except BlockingIOError:
                        await _writable(loop, self._stdin_fd)
        except OSError as error:
            # The container has closed its input, or our terminal hung up: nothing more to copy.
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
        finally:
            self._close_stdin()


class _Output:
    """One stream that comes out: a FIFO, copied to a file descriptor of ours."""

    def __init__(self, path: Path, target: int, unwanted: asyncio.Event) -> None:
        self._target, self._unwanted = target, unwanted
        self._read = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # While we hold a writing end ourselves there is no end of file before the container has opened it.
        self._hold = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._ended = asyncio.Event()
        self._last = 0.0

    def begin(self) -> None:
        asyncio.get_running_loop().add_reader(self._read, self._copy)

    def _copy(self) -> None:
        try:
            data = os.read(self._read, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            self._end()
            return
        self._last = asyncio.get_running_loop().time()
        try:
            _write_all(self._target, data)
        except BrokenPipeError:
            # The supervisor holds the pipe open, so that the container isn't told by itself.
            self._unwanted.set()
            self._end()

    def _end(self) -> None:
        if self._read >= 0:
            with suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._read)
            os.close(self._read)
            self._read = -1
        self._ended.set()

    async def finish(self) -> None:
        loop = asyncio.get_running_loop()
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
        self._last = began = loop.time()
        while not self._ended.is_set():
            now = loop.time()
            if now - self._last > _QUIET_SECONDS or now - began > _LONGEST_SECONDS:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await self._ended.wait()

    def close(self) -> None:
        self._end()
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1


def _write_all(fd: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            # Somebody made our output non-blocking (a terminal is shared with standard input).
            import select

            select.select([], [fd], [])


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def _readable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(fd, _settle, ready)
    except PermissionError:
        return  # a regular file is always ready, and epoll(7) refuses it
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def _writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def needs_terminal() -> None:
    """FAILED_PRECONDITION unless our standard input is a terminal."""
    if not sys.stdin.isatty():
        raise FailedPrecondition("standard input is not a terminal", hint="leave out -t, or run it from a terminal")
