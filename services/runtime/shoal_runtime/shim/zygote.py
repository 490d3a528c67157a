"""The zygote: one small process per node that has the shim's modules loaded and forks a shim for each container.

It is nobody's child: not of a service, not of whoever started the node. Whoever wants it connects and stays connected;
it leaves when nobody does and its last shim is gone, and one that died is simply started again: shims don't need it.

    python -I -S -c '…' zygote … <directory> <open files>        (see `command`)
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import ctypes
import fcntl
import gc
import os
import resource
import select
import sys

from shoal_runtime.shim import cgroups, files, protocol
from shoal_runtime.shim.loop import peer_is_root
from shoal_runtime.shim.reaper import rehearse
from shoal_runtime.shim.shim import supervise

PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
START_SECONDS, GRACE_SECONDS = 5.0, 0.5
"""How long it waits for the first that wants it, and how often it looks whether anybody does."""
_SERVICE_S_OWN = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "WATCHDOG_USEC", "WATCHDOG_PID")
"""What systemd says to a service: an OCI runtime that heard it would take it for its container's."""
_KEPT_OPEN = 3
_MOST_FDS = 1 << 20
_HIGHEST_OOM_SCORE = 1000
"""proc(5), /proc/pid/oom_score_adj."""

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
    listeners = []
    for name in (protocol.SHIM_SOCKET, protocol.ZYGOTE_SOCKET):
        try:
            os.unlink(f"{directory}/{name}")
        except FileNotFoundError:
            pass
        listeners.append(protocol.listen(directory, name))
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")
    _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
    # What a killed shim leaves comes to us.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    name_process("shoal-zygote")
    _die_sooner()
    cgroups.leave_unit()
    cgroups.prepare()
    for name in _SERVICE_S_OWN:
        os.environ.pop(name, None)
    rehearse()
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # the kernel reaps shims, and what killed ones leave
    shims, wanted = listeners
    Zygote(directory, wanted, shims).serve()


def _die_sooner() -> None:
    """A shim is likelier to be killed where memory is short than the service that started us, as containerd's are."""
    try:
        score = int(files.read("/proc/self/oom_score_adj"))
        files.append("/proc/self/oom_score_adj", str(min(score + 1, _HIGHEST_OOM_SCORE)))
    except OSError as error:
        sys.stderr.write(f"zygote: its OOM score stays: {error}\n")


def name_process(name: str) -> None:
    """What `ps` shows as the command's name."""
    _libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


class Zygote:
    """Forks a shim for each connection to `SHIM_SOCKET`, unread; one to `ZYGOTE_SOCKET` only says that it is wanted.

    A page that it writes to after a fork is the last shim's alone from then on, so it does as little as it can: what is
    asked for is read by the shim's worker, and what ends is reaped by the kernel (SIGCHLD is ignored).
    """

    def __init__(self, directory: str, wanted: _socket.socket, shims: _socket.socket) -> None:
        self._directory, self._wanted_at, self._shims_at = directory, wanted, shims
        self._wanted: dict[int, _socket.socket] = {}
        self._poll = select.poll()

    def serve(self) -> None:
        """Until nobody wants it and its last shim is gone."""
        # What is loaded now is never looked at by a garbage collector again: its pages stay shared with every shim.
        gc.collect()
        gc.freeze()
        shims, poll = self._shims_at.fileno(), self._poll
        poll.register(shims, select.POLLIN)
        poll.register(self._wanted_at.fileno(), select.POLLIN)
        grace = START_SECONDS
        while True:
            ready = poll.poll(None if self._wanted else int(grace * 1000))
            for fd, _ in ready:
                if fd == shims:
                    self._fork()
                else:
                    self._hear(fd)
                    grace = GRACE_SECONDS
            if not ready and not _has_children():
                break
        os.unlink(f"{self._directory}/{protocol.ZYGOTE_SOCKET}")
        os.unlink(f"{self._directory}/{protocol.SHIM_SOCKET}")

    def _hear(self, fd: int) -> None:
        """Somebody wants the zygote, or no longer."""
        if fd in self._wanted:
            try:
                if self._wanted[fd].recv(4096):
                    return  # whatever it says: the connection alone is what counts
            except OSError:
                pass
            self._poll.unregister(fd)
            self._wanted.pop(fd).close()
            return
        try:
            sock = protocol.accept(self._wanted_at)
        except (BlockingIOError, ConnectionAbortedError):
            return
        if peer_is_root(sock):
            self._wanted[sock.fileno()] = sock
            self._poll.register(sock.fileno(), select.POLLIN)
        else:
            sock.close()

    def _fork(self) -> None:
        try:
            sock, _address = self._shims_at._accept()  # type: ignore[attr-defined]  # a number is less to write to than an object
        except (BlockingIOError, ConnectionAbortedError):
            return
        if os.fork():
            os.close(sock)
            return
        status = 1
        try:
            _become_shim(sock)
            status = supervise(self._directory, sock)
        finally:
            os._exit(status)


def _has_children() -> bool:
    """Whether a child lives; one that has ended is none any more where SIGCHLD is ignored (wait(2))."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _become_shim(sock: int) -> None:
    """Lets go of everything that is the zygote's: descriptors, session, name."""
    os.closerange(_KEPT_OPEN, sock)
    os.closerange(sock + 1, _MOST_FDS)
    os.setsid()
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    name_process("shoal-shim")
