"""A process that forks a service's workers: what they need is loaded once, and one is there within milliseconds.

    server = ForkServer("shoal_snapshot.apply.worker")
    worker = await server.fork()
    worker.writer.write(…)
    line = await worker.reader.readline()
    status = await worker.wait()
    await server.close()

The server is a fork of this process that keeps nothing of it but a socket, and loads the module. A worker calls the
module's `work(requests, answers)` with a binary file and a descriptor, the two directions of one connection, and ends
when that returns. Standard output is the service's standard error there: what a library prints is no answer.

Workers are killed when the server dies, and it when this process does. A server that died is begun anew.
"""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from shoal_bus import forks

_IGNORED = (signal.SIGINT, signal.SIGTERM)
"""A signal for the whole group is the service's affair: it ends these processes when it has no use for them."""
_MESSAGE = struct.Struct("=?ii")
"""Whether a worker has ended, its process id, and how it ended as `os.waitstatus_to_exitcode` has it."""


class Gone(Exception):
    """The server died, or can't load its module."""


class Worker:
    """A process, and the connection to it."""

    def __init__(self, process: _Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process, self.reader, self.writer = process, reader, writer
        self.pid = process.pid
        process.ended.add_done_callback(lambda _: writer.close())

    @property
    def ended(self) -> bool:
        """Whether it has, as far as that is known."""
        return self._process.ended.done()

    def kill(self) -> None:
        """Kills it."""
        self._process.kill()

    async def wait(self) -> int:
        """Its exit status once it has ended, or the number of the signal that ended it, below zero."""
        return await asyncio.shield(self._process.ended)


class _Process:
    """What the server has forked; its pidfd is open until it has ended."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self.pidfd = pid, pidfd
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ended.add_done_callback(lambda _: os.close(pidfd))

    def kill(self) -> None:
        if not self.ended.done():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def died(self) -> None:
        """It has been killed, and nobody who could tell is left."""
        asyncio.get_running_loop().remove_reader(self.pidfd)
        self.ended.set_result(-signal.SIGKILL)


class ForkServer:
    """Forks workers of one module. It begins at once, so that the module is loaded when the first one is wanted."""

    def __init__(self, module: str, *, longest_line: int = 1 << 16) -> None:
        self._module, self._longest_line = module, longest_line
        self._socket: socket.socket | None = None
        self._pid = 0
        self._asked: deque[asyncio.Future[_Process]] = deque()
        self._running: dict[int, _Process] = {}
        self._begin()

    async def fork(self) -> Worker:
        """A new worker; one that nobody waits for any more ends with its input. Gone."""
        if self._socket is None:
            self._begin()
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._heard)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                asked: asyncio.Future[_Process] = loop.create_future()
                self._asked.append(asked)
                try:
                    socket.send_fds(self._socket, [b"f"], [theirs.fileno()])
                except OSError:
                    self._lost()
            process = await asked
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=self._longest_line)
        except BaseException:
            ours.close()
            raise
        return Worker(process, reader, writer)

    async def close(self) -> None:
        """Ends the server; whatever still works is killed."""
        if self._socket is not None:
            pid, running = self._pid, list(self._running.values())
            self._lost()
            for process in running:
                await process.ended
            await asyncio.to_thread(os.waitpid, pid, 0)

    # --------------------------------------------------------------------------------------------------------- within

    def _begin(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            _serve(theirs.detach(), self._module, parent)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours

    def _heard(self) -> None:
        while self._socket is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE.size, 1)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                pid = self._pid
                self._lost()
                os.waitpid(pid, 0)
                return
            ended, pid, status = _MESSAGE.unpack(data)
            if ended:
                self._running.pop(pid).ended.set_result(status)
                continue
            process = self._running[pid] = _Process(pid, fds[0])
            asked = self._asked.popleft()
            if not asked.done():
                asked.set_result(process)

    def _lost(self) -> None:
        """The server is gone, or is to go, and its workers with it."""
        if self._socket is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        while self._asked:
            asked = self._asked.popleft()
            if not asked.done():
                asked.set_exception(Gone(f"the process that forks {self._module} has ended"))
        while self._running:
            _, process = self._running.popitem()
            process.kill()  # the kernel does so, too, when the server is dead: a moment later
            asyncio.get_running_loop().add_reader(process.pidfd, process.died)


def _serve(fd: int, module: str, parent: int) -> NoReturn:
    """This fork is the server."""
    status = 1
    try:
        forks.let_go(fd, ignored=_IGNORED)
        forks.die_with(parent)
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
        os.dup2(2, 1)
        sys.stdout = sys.stderr = open(2, "w", 1, closefd=False)  # noqa: SIM115 (a descriptor)
        forks.name("shoal-forks")
        _Server(socket.socket(fileno=fd), module).run()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        pass  # the service is gone
    except BaseException:  # noqa: BLE001 (as the interpreter does with what nobody has caught)
        _tell()
    finally:
        os._exit(status)


class _Server:
    def __init__(self, asked: socket.socket, module: str) -> None:
        self._asked, self._module = asked, module
        self._children: dict[int, int] = {}
        """Process ids by what polls them."""

    def run(self) -> None:
        """Until the socket is closed at the other end."""
        import_module(self._module)
        gc.collect()
        gc.freeze()
        poll = select.poll()
        poll.register(self._asked, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd != self._asked.fileno():
                    poll.unregister(fd)
                    self._reap(fd)
                    continue
                try:
                    data, fds, _, _ = socket.recv_fds(self._asked, 1, 1)
                except ConnectionResetError:
                    data = b""
                if not data:
                    return
                poll.register(self._fork(fds[0]), select.POLLIN)

    def _fork(self, connection: int) -> int:
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            self._work(connection, parent)
        os.close(connection)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        socket.send_fds(self._asked, [_MESSAGE.pack(False, pid, 0)], [pidfd])
        return pidfd

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        with suppress(BrokenPipeError):
            self._asked.send(_MESSAGE.pack(True, pid, os.waitstatus_to_exitcode(status)))

    def _work(self, connection: int, parent: int) -> NoReturn:
        status = 1
        try:
            forks.die_with(parent)
            forks.let_go(connection, ignored=_IGNORED)
            forks.name("shoal-worker")
            with os.fdopen(connection, "rb", closefd=False) as requests:
                sys.modules[self._module].work(requests, connection)
            status = 0
        except (BrokenPipeError, ConnectionResetError):
            pass  # the service is gone, and so is this in a moment
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except BaseException:  # noqa: BLE001 (as above)
            _tell()
        finally:
            os._exit(status)


def _tell() -> None:
    """Writes the traceback to the service's log."""
    os.write(2, traceback.format_exc().encode())
