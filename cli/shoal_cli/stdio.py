"""A process's standard streams, copied from and to our own: from a FIFO to a descriptor of ours, and the other way.

All of them are open before the process is asked for, so that its first byte finds a reader. Its last byte is there
when it has exited: what is in the pipes then is copied to the end before we say so. However slow who reads our output
is, signals and the terminal's size go on being heard.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import stat
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from typing import Literal, Self

from shoal_bus.types import Stdio

from shoal_cli.detach import KeyWatch
from shoal_cli.telling import tell

_CHUNK = 1 << 16
_QUIET_SECONDS = 0.5
"""After the exit, a stream somebody still holds open is at its end when nothing came for so long."""
_QUIET_TERMINAL_SECONDS = 3.0
"""The same for a terminal, which a supervisor copies: it may be slow to have its turn."""
_LONGEST_SECONDS = 10.0
_LEAVING_SECONDS = 2.0
"""How long we try to be rid of what we have read, when we leave what isn't at its end."""

Left = Literal["detached", "hung up", "unwanted"]
"""Why we stop before the process does: the detach keys, our terminal is gone, or nobody takes our output any more."""


class Streams:
    """The FIFOs of one process, open for the length of a block. Without `stdin`, its input is left alone."""

    def __init__(self, stdio: Stdio, *, stdin: bool = True, keys: bytes = b"") -> None:
        self._stdio, self._keys = stdio, KeyWatch(keys)
        self._with_stdin = stdin and bool(stdio.stdin)
        self._stack = ExitStack()
        self._outputs: list[_Output] = []
        self._stdin_fd = -1
        self._hold_fd = -1
        self._pump: asyncio.Task[None] | None = None
        self.left: asyncio.Future[Left] = asyncio.get_running_loop().create_future()
        """Done when we have to leave."""

    def __enter__(self) -> Self:
        try:
            if self._with_stdin:
                self._open_input(self._stdio.stdin)
            for path, target in ((self._stdio.stdout, 1), (self._stdio.stderr, 2)):
                if path:
                    quiet = _QUIET_TERMINAL_SECONDS if self._stdio.terminal else _QUIET_SECONDS
                    output = _Output(path, target, quiet, self._unwanted)
                    self._stack.callback(output.close)
                    self._outputs.append(output)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._pump is not None:
            self._pump.cancel()
        self._stack.close()

    def _open_input(self, path: str) -> None:
        # Opened for both, so that it opens without a reader, and then for writing alone; the first one holds what we
        # write until the process has it open.
        self._hold_fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stack.callback(self._close_hold)
        self._stdin_fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stack.callback(self._close_stdin)

    def _close_hold(self) -> None:
        if self._hold_fd >= 0:
            os.close(self._hold_fd)
            self._hold_fd = -1

    def _close_stdin(self) -> None:
        if self._stdin_fd >= 0:
            os.close(self._stdin_fd)
            self._stdin_fd = -1

    def _leave(self, why: Left) -> None:
        if not self.left.done():
            self.left.set_result(why)

    def _unwanted(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            tell(f"shoal: what came out could not be written: {error.strerror}\n")
        self._leave("hung up" if error.errno == errno.EIO else "unwanted")

    def started(self, end_input: Callable[[], Awaitable[None]]) -> None:
        """The process runs: begins to copy. `end_input` is called when our input ends, unless it is a terminal."""
        for output in self._outputs:
            output.begin()
        self._close_hold()
        if self._with_stdin:
            self._pump = asyncio.create_task(self._copy_stdin(end_input))

    @property
    def ended(self) -> bool:
        """Whether all that comes out has ended: nobody has it open any more."""
        return all(output.ended for output in self._outputs)

    async def finish(self) -> None:
        """The process has exited: copies what is still on its way."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        await asyncio.gather(*(output.finish() for output in self._outputs))

    async def _copy_stdin(self, end_input: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await _readable(loop, 0)
                try:
                    data = os.read(0, _CHUNK)
                except BlockingIOError:
                    continue
                if not data:
                    break
                data, detached = self._keys.feed(data)
                while data:
                    try:
                        data = data[os.write(self._stdin_fd, data) :]
                    except BlockingIOError:
                        await _writable(loop, self._stdin_fd)
                if detached:
                    self._leave("detached")
                    return
        except OSError as error:
            # The process has closed its input: nothing more to copy. Or our terminal is gone, which reads as its end.
            if error.errno == errno.EPIPE:
                return
            if error.errno != errno.EIO:
                raise
        finally:
            self._close_stdin()
        if self._stdio.terminal:
            self._leave("hung up")
        else:
            await end_input()


class _Output:
    """One stream that comes out: a FIFO, copied to a file descriptor of ours. `unwanted` hears that nobody takes it."""

    def __init__(self, path: str, target: int, quiet: float, unwanted: Callable[[OSError], None]) -> None:
        self._quiet, self._unwanted = quiet, unwanted
        self._read = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # While we hold a writing end ourselves there is no end of file: not before the process has opened it.
        self._hold = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._target = _patient(target)
        is_socket = stat.S_ISSOCK(os.fstat(target).st_mode)
        self._socket = socket.socket(fileno=os.dup(self._target)) if is_socket else None
        self._pending = b""
        self._ended = asyncio.Event()
        self._last = 0.0

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def begin(self) -> None:
        self._close_hold()
        asyncio.get_running_loop().add_reader(self._read, self._copy)

    def _copy(self) -> None:
        try:
            data = os.read(self._read, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            self._end()
            return
        self._pending = data
        self._drain()

    def _write(self) -> None:
        if self._socket is not None:
            written = self._socket.send(self._pending, socket.MSG_DONTWAIT)
        else:
            written = os.write(self._target, self._pending)
        self._pending = self._pending[written:]

    def _drain(self) -> None:
        """Writes what was read; until all of it is, nothing more is read."""
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                self._write()
        except BlockingIOError:
            loop.remove_reader(self._read)
            loop.add_writer(self._target, self._drained)
        except OSError as error:
            # The supervisor holds the pipe open, so that the process isn't told by itself.
            self._pending = b""
            self._unwanted(error)
            self._end()
        self._last = loop.time()

    def _drained(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_writer(self._target)
        loop.add_reader(self._read, self._copy)
        self._drain()

    def _end(self) -> None:
        if self._read >= 0:
            with suppress(RuntimeError):
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._read)
                loop.remove_writer(self._target)
            os.close(self._read)
            self._read = -1
        self._ended.set()

    async def finish(self) -> None:
        loop = asyncio.get_running_loop()
        self._last = began = loop.time()
        while not self._ended.is_set():
            now = loop.time()
            if self._pending:
                began += now - self._last  # whoever reads us takes his time
                self._last = now
            elif now - self._last > self._quiet or now - began > _LONGEST_SECONDS:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await self._ended.wait()

    def _close_hold(self) -> None:
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1

    def _hand_over(self) -> None:
        """What has been read and isn't written yet nobody can read again: it is ours to write, if anybody takes it."""
        poll = select.poll()
        poll.register(self._target, select.POLLOUT)
        deadline = time.monotonic() + _LEAVING_SECONDS
        with suppress(OSError):
            while self._pending and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                with suppress(BlockingIOError):
                    self._write()

    def close(self) -> None:
        self._end()
        self._close_hold()
        self._hand_over()
        if self._target >= 0:
            os.close(self._target)
            self._target = -1
        if self._socket is not None:
            self._socket.close()


def _patient(target: int) -> int:
    """A descriptor for what `target` is that never blocks us, where there can be one: for a pipe or a terminal.

    It is opened anew: the flags of the one we have belong to others too, our shell among them.
    """
    mode = os.fstat(target).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{target}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return os.dup(target)


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
