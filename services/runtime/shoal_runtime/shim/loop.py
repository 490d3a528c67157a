"""The event loop of zygote and shims: poll(2), processes, connections. A few functions instead of asyncio's 10 MiB."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import fcntl
import os
import select
import time

from shoal_runtime.shim import files, protocol
from shoal_runtime.shim.reaper import ENDED, Handover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

_CHUNK = 65536
_MAX_OUTPUT = 64 * 1024
_STRAY_SECONDS = 0.05
_RESET = [_signal.SIGCHLD, _signal.SIGPIPE, _signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGXFSZ]
"""Signals that Python or we ignore or handle: a program we start has them as usual."""


class Loop:
    """File descriptors, timers and children, and who is called for each."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._children: dict[int, Callable[[int], None]] = {}
        self._own: set[int] = set()
        self._unclaimed: dict[int, int] = {}
        self._expected = 0
        self._idle: tuple[float, Callable[[], None]] | None = None
        self._strays_since = 0.0
        self.adopts = False
        """Whether orphans of a container come to us, as they do from one in the host's PID namespace."""
        self.running = True
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._pipe = reader, writer
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.watch(reader, select.POLLIN, self._child_signal)

    def close(self) -> None:
        _signal.set_wakeup_fd(-1)
        for fd in self._pipe:
            os.close(fd)

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls `callback` with poll's events whenever `fd` has some of them; replaces what was watched for before."""
        self._callbacks[fd] = callback
        self._poll.register(fd, events)

    def forget(self, fd: int) -> None:
        """Watches `fd` no longer."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def hear_of(self, reaper: _socket.socket) -> None:
        """Takes from a reaper how processes ended that aren't our own children."""

        def told(_: int) -> None:
            while True:
                try:
                    pid, status = ENDED.unpack(reaper.recv(ENDED.size))
                except BlockingIOError:
                    return
                self._settle(pid, status)

        self.watch(reaper.fileno(), select.POLLIN, told)

    def when_idle(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls `callback` whenever nothing has happened for `seconds`, no timer is set and no child of ours runs."""
        self._idle = seconds, callback

    def after(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls `callback` once, in `seconds`."""
        self._timers.append((time.monotonic() + seconds, callback))

    def expect(self) -> None:
        """A child whose pid isn't known yet is about to come: what ends unclaimed is remembered, until `expected`."""
        self._expected += 1

    def expected(self) -> None:
        """That child has been claimed, or doesn't come. What nobody claimed was an orphan."""
        self._expected -= 1
        if not self._expected:
            self._unclaimed.clear()
            if self._strays_since:
                self.kill_strays(self._strays_since)

    def kill_strays(self, since: float) -> None:
        """Kills what a program that was killed has left us: children nobody claims, begun after `since` (of boot time).

        As soon as none is expected that could be taken for one; not where orphans of a container come to us, too.
        """
        if self.adopts:
            return
        if self._expected:
            self._strays_since = min(since, self._strays_since or since)
            return
        self._strays_since = 0.0
        oldest = int(since * os.sysconf("SC_CLK_TCK"))
        # A program's orphans become the reaper's children, as those of the containers do.
        found, parent, ourselves = False, os.getppid(), os.getpid()
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) in self._children or int(name) == ourselves:
                continue
            try:
                fields = files.read(f"/proc/{name}/stat").rpartition(b")")[2].split()
                if int(fields[1]) == parent and fields[0] != b"Z" and int(fields[19]) >= oldest:
                    os.kill(int(name), _signal.SIGKILL)
                    found = True
            except (OSError, IndexError):
                pass  # it has ended
        if found:  # one may have been about to fork
            self.after(_STRAY_SECONDS, lambda: self.kill_strays(since))

    def claim(self, pid: int, callback: Callable[[int], None]) -> None:
        """Calls `callback` with the wait status of the child `pid` when it ends, or at once when it has."""
        if pid in self._unclaimed:
            callback(self._unclaimed.pop(pid))
        else:
            self._children[pid] = callback

    def run(self) -> None:
        """Until `running` is false."""
        while self.running:
            timeout = None
            if self._timers:
                timeout = max(0, int((min(t for t, _ in self._timers) - time.monotonic()) * 1000) + 1)
            elif self._idle is not None and not self._own and not self._expected:
                timeout = int(self._idle[0] * 1000)
            happened = self._poll.poll(timeout)
            for fd, events in happened:
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback(events)
            if not happened and not self._timers and self._idle is not None:
                self._idle[1]()
            now = time.monotonic()
            due = [entry for entry in self._timers if entry[0] <= now]
            for entry in due:
                self._timers.remove(entry)
                entry[1]()

    def _child_signal(self, _: int) -> None:
        try:
            os.read(self._pipe[0], 4096)
        except BlockingIOError:
            pass
        self.reap()

    def reap(self) -> None:
        """Collects every child that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._own.discard(pid)
            self._settle(pid, status)

    def _settle(self, pid: int, status: int) -> None:
        callback = self._children.pop(pid, None)
        if callback is not None:
            callback(status)
        elif self._expected:
            # An orphan, or a container's process that ended before its pid was told.
            self._unclaimed[pid] = status

    def spawn(
        self,
        argv: Sequence[str],
        done: Callable[[int, str], None],
        *,
        files: Mapping[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
        capture: bool = True,
        session: bool = False,
        directory: str = "/",
    ) -> int:
        """Starts a program; `done` gets its wait status and (with `capture`) what it printed. Returns its pid.

        `files` gives it descriptors of ours (`{0: stdin, …}`); the rest is /dev/null, or what is captured. With
        `session` it leads one of its own: it isn't killed with what we leave unfinished when we are. `directory` is its
        working directory, where that is still there. OSError when there is no such program.
        """
        output = bytearray()
        # Above the targets, so that none of them overwrites what is still to be copied.
        given = {fd: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 16) for fd, source in (files or {}).items()}
        actions: list[tuple[Any, ...]] = []
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if capture else (-1, -1)
        try:
            for fd in sorted({0, 1, 2, *given}):
                source = given.get(fd, writer if capture and fd else null)
                actions.append((os.POSIX_SPAWN_DUP2, source, fd))
            _enter(directory)
            pid = os.posix_spawnp(
                argv[0],
                list(argv),
                dict(environment if environment is not None else os.environ),
                file_actions=actions,
                setsigmask=[],
                setsigdef=_RESET,
                setsid=session,
            )
        except BaseException:
            if capture:
                os.close(reader)
            raise
        finally:
            _enter("/")
            for fd in (null, *given.values()):
                os.close(fd)
            if capture:
                os.close(writer)

        def read(_: int) -> None:
            try:
                data = os.read(reader, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                self.forget(reader)
                return
            if len(output) < _MAX_OUTPUT:
                output.extend(data)

        def ended(status: int) -> None:
            if capture:
                read(0)
                self.forget(reader)
                os.close(reader)
            done(status, output.decode(errors="replace"))

        if capture:
            self.watch(reader, select.POLLIN, read)
        self._own.add(pid)
        self.claim(pid, ended)
        return pid


class Connection:
    """One peer on a socket: frames in, frames out, never blocking."""

    def __init__(
        self,
        loop: Loop,
        sock: _socket.socket,
        heard: Callable[[Connection, dict[str, Any]], None],
        closed: Callable[[Connection], None],
    ) -> None:
        sock.setblocking(False)
        self._loop, self._socket, self._heard, self._closed = loop, sock, heard, closed
        self._decoder, self._out = protocol.Decoder(), bytearray()
        self._closing = False
        loop.watch(sock.fileno(), select.POLLIN, self._ready)

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; a peer that has gone is noticed when it is read from."""
        self._out += protocol.encode(message)
        self._flush()

    def give_to(
        self, heard: Callable[[Connection, dict[str, Any]], None], closed: Callable[[Connection], None]
    ) -> None:
        """What comes from now on, and its end, are somebody else's."""
        self._heard, self._closed = heard, closed

    def leave_to(self, handover: Handover) -> int | None:
        """Its place in what is handed over; None while a message is on its way."""
        if self._out or self._closing or not self._decoder.empty:
            return None
        return handover.keep(self._socket.fileno(), select.POLLIN)

    def close_when_sent(self) -> None:
        """Closes it as soon as the peer has taken what was sent."""
        self._closing = True
        self._flush()

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._closed(self)

    def _ready(self, events: int) -> None:
        if events & select.POLLOUT:
            self._flush()
        if events & ~select.POLLOUT and self._socket.fileno() >= 0:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            try:
                for message in self._decoder.feed(data):
                    self._heard(self, message)
            except ValueError:
                self.close()

    def _flush(self) -> None:
        while self._out and self._socket.fileno() >= 0:
            try:
                sent = self._socket.send(self._out, _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError:
                self._out.clear()
                break
            del self._out[:sent]
        if self._closing and not self._out:
            self.close()
        if self._socket.fileno() >= 0:
            wanted = select.POLLIN | (select.POLLOUT if self._out else 0)
            self._loop.watch(self._socket.fileno(), wanted, self._ready)


def serve(
    loop: Loop,
    listener: _socket.socket,
    heard: Callable[[Connection, dict[str, Any]], None],
    accepted: Callable[[Connection], None],
    closed: Callable[[Connection], None],
) -> None:
    """Accepts connections of root's, and nobody else's."""

    def accept(_: int) -> None:
        try:
            sock = protocol.accept(listener)
        except (BlockingIOError, ConnectionAbortedError):
            return
        if peer_is_root(sock):
            accepted(Connection(loop, sock, heard, closed))
        else:
            sock.close()

    loop.watch(listener.fileno(), select.POLLIN, accept)


def peer_is_root(sock: _socket.socket) -> bool:
    """Whether whoever connected is root (unix(7), SO_PEERCRED)."""
    credentials = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], "little") == 0


def _enter(directory: str) -> None:
    """Changes the working directory, which a child inherits, to one that may have gone."""
    try:
        os.chdir(directory)
    except FileNotFoundError:
        pass
