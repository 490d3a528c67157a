"""A process's standard streams: FIFOs and files handed to the OCI runtime as they are, or a terminal held open.

A FIFO's other end is kept open here too, until the process has exited: an opening never blocks, a reader that comes
late (or comes again) misses nothing that fits the pipe, and end of file comes when the process is gone, not before.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import select
import stat
import struct
import termios

from shoal_runtime.shim.logger import Logger
from shoal_runtime.shim.loop import Loop
from shoal_runtime.shim.protocol import ShimError, accept
from shoal_runtime.shim.reaper import Handover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Self

_CHUNK = 65536
_FD = struct.Struct("i")
_BUFFERED = 1 << 20
_LATE_READER_SECONDS, _LATEST_READER_SECONDS = 0.05, 1.0
CONSOLE_SOCKET = "console.sock"


def _path(uri: str) -> str:
    if not uri.startswith("file://"):
        return uri
    from urllib.parse import unquote, urlsplit  # only where it is needed: half a mebibyte

    return unquote(urlsplit(uri).path)


def unread(stdio: dict[str, Any]) -> bool:
    """Whether there is something in the client's FIFOs that somebody has yet to read."""
    for name in ("stdout", "stderr"):
        where = stdio.get(name, "")
        if not where or "://" in where:
            continue
        try:
            fd = os.open(where, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # nobody reads (fifo(7), ENXIO), or it has gone
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode) and any(fcntl.ioctl(fd, termios.FIONREAD, bytes(_FD.size))):
                return True
        finally:
            os.close(fd)
    return False


class Streams:
    """The descriptors of one process without a terminal: `files` for the runtime, and the ends kept open."""

    def __init__(self) -> None:
        self.files: dict[int, int] = {}
        self._keepers: list[int] = []
        self._stdin_keeper = -1

    @classmethod
    def restored(cls, state: dict[str, Any], fds: Sequence[int]) -> Self:
        """The ends that another worker kept open."""
        streams = cls()
        streams._stdin_keeper = fds[state["stdin"]] if state["stdin"] >= 0 else -1
        streams._keepers = [fds[place] for place in state["keepers"]]
        return streams

    def leave_to(self, handover: Handover) -> dict[str, Any]:
        """What `restored` makes the same of again, once the runtime has its files."""
        stdin = handover.keep(self._stdin_keeper) if self._stdin_keeper >= 0 else -1
        return {"stdin": stdin, "keepers": [handover.keep(fd) for fd in self._keepers]}

    def open(self, stdio: dict[str, Any], logger: Logger | None) -> None:
        """Opens what the client gives. FAILED_PRECONDITION where that can't be."""
        try:
            self.files[0] = self._input(stdio.get("stdin", ""))
            if logger is not None:
                self.files[1] = os.dup(logger.stdout)
                self.files[2] = os.dup(logger.stderr)
            else:
                self.files[1] = self._output(stdio.get("stdout", ""))
                self.files[2] = self._output(stdio.get("stderr", ""))
        except OSError as error:
            self.close()
            raise ShimError("FAILED_PRECONDITION", f"standard streams: {error.strerror}: {error.filename}") from None
        except BaseException:
            self.close()
            raise

    def _input(self, where: str) -> int:
        if not where:
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        path = _path(where)
        if not stat.S_ISFIFO(os.stat(path).st_mode):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._stdin_keeper = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _output(self, where: str) -> int:
        if not where:
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        path = _path(where)
        if where.startswith("file://"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            return os.open(path, flags, 0o644)
        if "://" in where:
            raise ShimError(
                "INVALID_ARGUMENT", f"standard streams: {where}: give a FIFO's path, file:///… or binary:///…"
            )
        if stat.S_ISFIFO(os.stat(path).st_mode):
            self._keepers.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def handed_over(self) -> None:
        """The runtime has its copies: ours would keep readers from ever seeing the end."""
        for fd in self.files.values():
            os.close(fd)
        self.files.clear()

    def close_stdin(self) -> None:
        """The process reads end of file once the writers' side is empty."""
        if self._stdin_keeper >= 0:
            os.close(self._stdin_keeper)
            self._stdin_keeper = -1

    def finish(self, loop: Loop) -> None:
        """The process has exited: readers see the end once no process of the container writes any more.

        What nobody has read yet stays in the pipe for a reader that comes late, as long as one end of it is open; once
        there is a reader, our end goes.
        """
        self.close_stdin()
        keepers, self._keepers = self._keepers, []
        for fd in keepers:
            writer = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.close(fd)
            self._keepers.append(writer)
        self._let_readers_finish(loop, _LATE_READER_SECONDS)

    def _let_readers_finish(self, loop: Loop, pause: float) -> None:
        for fd in list(self._keepers):
            poll = select.poll()
            poll.register(fd, 0)
            if not poll.poll(0):  # POLLERR would say that nobody has it open for reading
                os.close(fd)
                self._keepers.remove(fd)
        if self._keepers:
            longer = min(2 * pause, _LATEST_READER_SECONDS)
            loop.after(pause, lambda: self._let_readers_finish(loop, longer))

    def close(self) -> None:
        """Lets go of everything."""
        self.handed_over()
        self.close_stdin()
        for fd in self._keepers:
            os.close(fd)
        self._keepers.clear()


class ConsoleSocket:
    """Where the OCI runtime sends the pseudo-terminal's master side (runc, docs/terminals.md)."""

    def __init__(self, directory: str) -> None:
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            self._listener.bind(f"/proc/self/fd/{self._directory}/{CONSOLE_SOCKET}")
            self._listener.listen(1)
            self._listener.setblocking(False)
        except BaseException:
            self.close()
            raise
        # As the runtime, another process, finds it; the real path may be longer than a socket's can be.
        self.path = f"/proc/{os.getpid()}/fd/{self._directory}/{CONSOLE_SOCKET}"

    def receive(self) -> int:
        """The master's descriptor, once the runtime has been there."""
        try:
            peer = accept(self._listener)
        except BlockingIOError:
            raise ShimError("FAILED_PRECONDITION", "the OCI runtime sent no terminal") from None
        try:
            peer.settimeout(5)
            _, ancillary, _, _ = peer.recvmsg(4096, _socket.CMSG_SPACE(_FD.size), _socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in ancillary:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    (master,) = _FD.unpack_from(data)
                    return int(master)
        finally:
            peer.close()
        raise ShimError("FAILED_PRECONDITION", "the OCI runtime sent no terminal")

    def close(self) -> None:
        self._listener.close()
        if self._directory >= 0:
            try:
                os.unlink(CONSOLE_SOCKET, dir_fd=self._directory)
            except FileNotFoundError:
                pass
            os.close(self._directory)
            self._directory = -1


class Terminal:
    """Copies between a pseudo-terminal's master side and the client's FIFOs, to the last byte.

    Nobody reading is no reason to hang: what has been read waits here up to a bound, and then the terminal fills.
    """

    def __init__(self, loop: Loop, stdio: dict[str, Any], logger: Logger | None) -> None:
        self._loop, self._master = loop, -1
        stdin, stdout = stdio.get("stdin", ""), stdio.get("stdout", "") if logger is None else ""
        self._in = self._open(stdin, os.O_RDONLY) if stdin else -1
        self._in_keeper = -1
        try:
            # A writer kept open: without one, a FIFO nobody writes to reads as ended, for ever.
            self._in_keeper = self._open(stdin, os.O_RDWR) if stdin else -1
            is_file = stdout.startswith("file://")  # which needs no reader, and is made by the writer's opening
            self._out_keeper = self._open(stdout, os.O_RDWR) if stdout and not is_file else -1
            self._out = self._open(stdout, os.O_WRONLY) if stdout else -1
            if logger is not None:
                self._out = os.dup(logger.stdout)
                os.set_blocking(self._out, False)
        except BaseException:
            self.close()
            raise
        self._to_process, self._to_client = bytearray(), bytearray()
        self._ended = False
        self.finished = False
        """The process has exited, and its last output is in the client's hands."""
        self._on_finish: Callable[[], None] | None = None

    @staticmethod
    def _open(where: str, flags: int) -> int:
        extra = os.O_CREAT | os.O_APPEND if where.startswith("file://") and flags == os.O_WRONLY else 0
        try:
            return os.open(_path(where), flags | extra | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ShimError("FAILED_PRECONDITION", f"standard streams: {error.strerror}: {error.filename}") from None

    def attach(self, master: int) -> None:
        """The master side is there: copying begins."""
        self._master = master
        os.set_blocking(master, False)
        if self._in >= 0:
            self._loop.watch(self._in, select.POLLIN, self._from_client)
        self._watch_master()

    def resize(self, width: int, height: int) -> None:
        """Tells the terminal its size (tty_ioctl(4), TIOCSWINSZ)."""
        if self._master >= 0:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def close_stdin(self) -> None:
        """Nothing more comes from the client."""
        if self._in >= 0:
            self._loop.forget(self._in)
            os.close(self._in)
            self._in = -1

    def finish(self, finished: Callable[[], None]) -> None:
        """The process has exited: calls `finished` when its last output is in the client's hands."""
        self._on_finish = finished
        self._from_process(select.POLLIN)

    def close(self) -> None:
        for name in ("_in", "_in_keeper", "_out", "_out_keeper", "_master"):
            fd = getattr(self, name, -1)
            if fd >= 0:
                self._loop.forget(fd)
                os.close(fd)
                setattr(self, name, -1)

    def _watch_master(self) -> None:
        if self._master < 0 or self._ended:
            return
        events = select.POLLOUT if self._to_process else 0
        if len(self._to_client) < _BUFFERED:
            events |= select.POLLIN
        if events:
            self._loop.watch(self._master, events, self._from_process)
        else:
            self._loop.forget(self._master)

    def _from_client(self, _: int) -> None:
        try:
            data = os.read(self._in, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            self.close_stdin()
            return
        self._to_process += data
        self._write_process()
        if len(self._to_process) > _BUFFERED:
            self._loop.forget(self._in)

    def _write_process(self) -> None:
        if self._master < 0 or self._ended:
            return
        try:
            while self._to_process:
                del self._to_process[: os.write(self._master, self._to_process[:_CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            self._to_process.clear()
        if self._in >= 0 and len(self._to_process) <= _BUFFERED:
            self._loop.watch(self._in, select.POLLIN, self._from_client)
        self._watch_master()

    def _from_process(self, events: int) -> None:
        if events & select.POLLOUT:
            self._write_process()
        if events & ~select.POLLOUT:
            self._read_process()
        self._watch_master()
        self._check_finished()

    def _read_process(self) -> None:
        closed = False
        while self._master >= 0 and len(self._to_client) < _BUFFERED:
            try:
                data = os.read(self._master, _CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""  # EIO: no process has the terminal open any more
            if data:
                closed = False
                self._to_client += data
                self._write_client(0)
            elif closed:
                self._ended = True
                self._loop.forget(self._master)
                return
            # The kernel looks for data first and for writers then: what is written and closed in between is behind EIO.
            closed = not data

    def _write_client(self, _: int) -> None:
        if self._out < 0:
            self._to_client.clear()
        try:
            while self._to_client:
                del self._to_client[: os.write(self._out, self._to_client[:_CHUNK])]
        except BlockingIOError:
            self._loop.watch(self._out, select.POLLOUT, self._write_client)
            return
        except OSError:
            self._to_client.clear()
        if self._out >= 0:
            self._loop.forget(self._out)
        self._watch_master()
        self._check_finished()

    def _check_finished(self) -> None:
        if self._on_finish is not None and self._ended and not self._to_client:
            self.finished = True
            callback, self._on_finish = self._on_finish, None
            callback()
