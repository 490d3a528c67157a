"""The zygote: one small process per node that has the shim's modules loaded and forks a shim for each container.

It is nobody's child: not of a service, not of whoever started the node. Whoever wants it connects and stays connected;
it leaves when nobody does and its last shim is gone, and one that died is simply started again: shims don't need it.

    python -I -S -c '…' zygote … <directory> <open files>        (see `command`)
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import sys
from typing import Any

from shoal_runtime.shim import cgroups, protocol
from shoal_runtime.shim.loop import Connection, Loop, peer_is_root
from shoal_runtime.shim.protocol import ShimError
from shoal_runtime.shim.shim import Shim

PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
START_SECONDS, GRACE_SECONDS = 5.0, 0.5
"""How long it waits for the first that wants it, and how often it looks whether anybody does."""
_KEPT_OPEN = 3

_libc = ctypes.CDLL(None, use_errno=True)


def command(directory: str, open_files: int) -> list[str]:
    """How to start it: a bare interpreter, with nothing on its path but this package.

    `open_files` is the soft limit on open files that it has, its shims, and the runtimes they start.
    """
    package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    start = "from shoal_runtime.shim.zygote import main; main(*sys.argv[3:])"
    code = f"import sys; sys.path.insert(0, sys.argv[2]); {start}"
    return [sys.executable, "-I", "-S", "-c", code, "shoal-zygote", package_root, directory, str(open_files)]


def main(directory: str, open_files: str) -> None:
    """Becomes the zygote of `directory`, in the background; exits 0 once it answers, also when another one does."""
    os.closerange(_KEPT_OPEN, 1 << 20)  # the service's event loop leaves us some of its own
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(open_files), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    lock = os.open(f"{directory}/{protocol.ZYGOTE_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    try:
        os.unlink(f"{directory}/{protocol.ZYGOTE_SOCKET}")
    except FileNotFoundError:
        pass
    listener = protocol.listen(directory, protocol.ZYGOTE_SOCKET)
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # What a killed shim leaves comes to us, and is reaped.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    name_process("shoal-zygote")
    cgroups.leave_unit()
    Zygote(directory, listener).serve()


def name_process(name: str) -> None:
    """What `ps` shows as the command's name."""
    _libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


class Zygote:
    """Accepts connections; forks a shim for each that asks for one, and gives it the connection."""

    def __init__(self, directory: str, listener: socket.socket) -> None:
        self._directory, self._listener = directory, listener
        self._loop = Loop()
        self._wanted: list[Connection] = []
        self._shims: set[int] = set()

    def serve(self) -> None:
        """Until nobody wants it and its last shim is gone."""
        # What is loaded now is never looked at by a garbage collector again: its pages stay shared with every shim.
        gc.collect()
        gc.freeze()
        self._loop.watch(self._listener.fileno(), select.POLLIN, self._accept)
        self._loop.after(START_SECONDS, self._leave_if_unwanted)
        self._loop.run()
        os.unlink(f"{self._directory}/{protocol.ZYGOTE_SOCKET}")

    def _leave_if_unwanted(self) -> None:
        if not self._wanted and not self._shims:
            self._loop.running = False

    def _accept(self, _: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if not peer_is_root(sock):
            sock.close()
            return
        self._wanted.append(_Peer(self, self._loop, sock))

    def fork(self, sock: socket.socket, request: dict[str, Any]) -> None:
        """A shim for `request`, which talks to whoever asked on `sock` from here on."""
        os.makedirs(f"{self._directory}/shims", mode=0o700, exist_ok=True)
        pid = os.fork()
        if pid:
            self._shims.add(pid)
            self._loop.claim(pid, lambda _: self._shim_ended(pid))
            return
        status = 1
        try:
            _become_shim(sock)
            Shim(self._directory).run(sock, request)
            status = 0
        except BaseException as error:  # noqa: BLE001 (a forked child: whatever it is, it ends here)
            _last_words(sock, request, error)
        finally:
            os._exit(status)

    def _shim_ended(self, pid: int) -> None:
        self._shims.discard(pid)
        self._loop.after(GRACE_SECONDS, self._leave_if_unwanted)

    def gone(self, connection: Connection) -> None:
        if connection in self._wanted:
            self._wanted.remove(connection)
            self._loop.after(GRACE_SECONDS, self._leave_if_unwanted)


class _Peer(Connection):
    """A connection that only says that the zygote is wanted, until it asks for a shim."""

    def __init__(self, zygote: Zygote, loop: Loop, sock: socket.socket) -> None:
        super().__init__(loop, sock, self._asked, zygote.gone)
        self._zygote, self._sock = zygote, sock

    def _asked(self, _: Connection, message: dict[str, Any]) -> None:
        if message.get("op") != "create":
            error = ShimError("UNIMPLEMENTED", f"the zygote doesn't know {message.get('op')!r}")
            self.send({"n": message.get("n", 0), "error": error.to_wire()})
            return
        self._zygote.fork(self._sock, message)
        self.close()


def _become_shim(sock: socket.socket) -> None:
    """Lets go of everything that is the zygote's: descriptors, session, signals."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kept = sock.fileno()
    os.closerange(_KEPT_OPEN, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 1 << 20 else 1 << 20)
    os.setsid()
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    name_process("shoal-shim")


def _last_words(sock: socket.socket, request: dict[str, Any], error: BaseException) -> None:
    told = error if isinstance(error, ShimError) else ShimError("INTERNAL", f"shim: {type(error).__name__}: {error}")
    try:
        sock.setblocking(True)
        sock.sendall(protocol.encode({"n": request.get("n", 0), "error": told.to_wire()}))
    except OSError:
        pass  # whoever asked has gone
