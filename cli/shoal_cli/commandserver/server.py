"""The node's side: forks a command for each caller, out of a process that has the whole command line loaded."""

from __future__ import annotations

import _socket
import asyncio
import fcntl
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_bus.forks import let_go

import shoal_cli
from shoal_cli import forks
from shoal_cli.commandserver import caller, protocol

REQUEST_SECONDS = 5.0
"""How long a caller may take to say what it wants."""


@contextmanager
def serving(state: Path) -> Iterator[None]:
    """Takes commands at a state directory while the block lasts; what was begun goes on after it."""
    loop = asyncio.get_running_loop()
    _load()
    listener = protocol.listen(str(state))
    loop.add_reader(listener.fileno(), _accept, listener)
    try:
        yield
    finally:
        loop.remove_reader(listener.fileno())
        listener.close()
        (state / protocol.SOCKET).unlink(missing_ok=True)


def _load() -> None:
    """Loads every command."""
    modules = (module.name for module in pkgutil.walk_packages(shoal_cli.__path__, f"{shoal_cli.__name__}."))
    forks.load(*(name for name in modules if not name.endswith(".__main__")))
    from shoal_cli.app import command

    command()


def _accept(listener: _socket.socket) -> None:
    try:
        fd, _address = listener._accept()  # type: ignore[attr-defined]
    except (BlockingIOError, ConnectionAbortedError):
        return
    try:
        pid = os.fork()
    except OSError:  # no room for one more: it is run where it was called
        os.close(fd)
        return
    if not pid:
        try:
            _command(fd)
        finally:
            os._exit(1)
    os.close(fd)
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(pid)
    loop.add_reader(pidfd, _reap, loop, pidfd)


def _reap(loop: asyncio.AbstractEventLoop, pidfd: int) -> None:
    loop.remove_reader(pidfd)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def _command(fd: int) -> None:
    """This fork becomes the command that is asked for on `fd`, and never returns."""
    let_go(fd)
    sock = _socket.socket(fileno=fd)
    pid, uid = protocol.peer(sock)
    if uid != 0:
        os._exit(1)
    sock.settimeout(REQUEST_SECONDS)
    try:
        size, fds = protocol.receive_fds(sock, protocol.LENGTH.size, protocol.FDS)
        (length,) = protocol.LENGTH.unpack(size)
        if len(fds) != protocol.FDS or length > protocol.MAX_REQUEST:
            raise ValueError("this is no request")
        identity, arguments, environment = protocol.decode(protocol.receive(sock, length))
        caller.become(pid)
        _take_over(fds, environment)
        if identity != protocol.identity() or not forks.is_current():
            raise caller.Different("the code")
        sock.settimeout(None)
        _die_with(sock)
        protocol.send_fds(sock, protocol.ACCEPTED, [os.pidfd_open(os.getpid())])
    except (OSError, EOFError, ValueError, caller.Different):
        with suppress(OSError):
            sock.send(protocol.REFUSED)
        os._exit(1)
    code = _run(arguments)
    with suppress(OSError):
        sock.send(bytes([code & 0xFF]))
    os._exit(0)


def _take_over(fds: list[int], environment: dict[bytes, bytes]) -> None:
    """The caller's streams, working directory and environment are ours."""
    *streams, directory = fds
    os.environb.clear()
    os.environb.update(environment)
    time.tzset()
    os.fchdir(directory)
    os.close(directory)
    forks.take_streams(*streams, lines=os.isatty(streams[1]))


def _die_with(sock: _socket.socket) -> None:
    """From now on the kernel kills us when whoever is at the other end has gone (fcntl(2), O_ASYNC)."""
    fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sock, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sock, fcntl.F_SETFL, fcntl.fcntl(sock, fcntl.F_GETFL) | os.O_ASYNC)


def _run(arguments: list[str]) -> int:
    from shoal_cli.app import run

    forks.name("shoal", "shoal " + " ".join(arguments))
    sys.argv = ["shoal", *arguments]
    try:
        code = run(arguments)
        sys.stdout.flush()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter does with what nobody has caught)
        traceback.print_exc()
        code = 1
    return code
