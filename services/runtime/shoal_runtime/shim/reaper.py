"""The shim's first process: whatever its containers leave becomes its child, and is reaped here.

It is all of a shim that is there while nothing happens. What has to be done is done by a worker, a fork of it that
writes to ten times as many pages and ends after a second without work; what the worker held open (sockets, FIFOs,
pidfds, the OOM event) it leaves to the reaper, with its state, and the next worker inherits that. So an idle container
costs the pages that this module writes to, and none of those that its creation did.

    zygote ── reaper (subreaper, leads a session) ── worker ── the OCI runtime, for as long as it works
                 └── the container's processes, from when the OCI runtime leaves them

A worker dies with its reaper. A reaper whose worker dies otherwise than in order ends too: what such a worker had
under way nobody knows, and the runtime service takes the container down as it does for any dead shim.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import ctypes
import os
import select
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ENDED = struct.Struct("ii")
"""What the reaper writes to its worker: a pid, and its wait status."""
IDLE_STATUS = 75
"""What a worker exits with that has handed everything over; 0 when its last container is gone."""
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15

_HEADER = struct.Struct("ii")
_MOST_FDS = 253  # SCM_MAX_FD of the kernel: so many in one message
_MOST_BYTES = 64 * 1024
_ANCILLARY = _socket.CMSG_SPACE(4 * _MOST_FDS)
_REHEARSALS = 2

_libc = ctypes.CDLL(None, use_errno=True)


class Handover:
    """What a worker leaves to the reaper: descriptors, what is to be heard on them, and its state."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.pids: list[int] = []
        """The processes whose end is worth a new worker."""
        self._events: list[int] = []

    def keep(self, fd: int, events: int = 0) -> int:
        """Keeps a descriptor open, and begins a worker when poll(2) has one of `events` for it; its place in `fds`."""
        self.fds.append(fd)
        self._events.append(events)
        return len(self.fds) - 1

    def send(self, sock: _socket.socket, state: bytes) -> bool:
        """Hands everything over, or says that it is too much: then the worker stays."""
        head = _HEADER.pack(len(self.pids), len(self.fds))
        data = head + struct.pack(f"{len(self.pids) + len(self.fds)}i", *self.pids, *self._events) + state
        if len(self.fds) > _MOST_FDS or len(data) > _MOST_BYTES:
            return False
        rights = struct.pack(f"{len(self.fds)}i", *self.fds)
        try:
            sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if self.fds else [])
        except OSError:
            return False  # its queue is full, or the kernel has no room for so many descriptors on their way
        return True


class Worker:
    """What a worker is given: `state` and `fds` as another one left them (at first none), and `reaper`.

    `reaper` is a socket that doesn't block: `ENDED` records come from it, of processes that aren't the worker's own
    children, and a handover goes to it.
    """

    def __init__(self, state: bytes, fds: list[int], reaper: _socket.socket) -> None:
        self.state, self.fds, self.reaper = state, fds, reaper


def reap(fds: list[int], work: Callable[[Worker], int]) -> int:
    """Is the reaper, until a worker ends that leaves nothing to be done; what that exited with.

    `work` is what a worker does, the first with `fds`: it returns what the worker exits with, and raises nothing.
    Terse, and with one socket pair for everything (what a worker says, and that a child has ended), because all that
    is touched here is memory of every container.
    """
    ours, theirs = _socket.socketpair(
        _socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    )
    ours.setblocking(True)
    _signal.signal(_signal.SIGCHLD, _noted)
    _signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    poll = None
    pids: Sequence[int] = ()
    rights: list[tuple[int, int, bytes]] = []
    state = b""
    worker = _begin(work, state, fds, ours, theirs)
    while True:
        if poll is not None and [fd for fd, _ in poll.poll() if fd != ours.fileno()]:
            poll = None
            worker = _begin(work, state, fds, ours, theirs)
        data, ancillary, _, _ = ours.recvmsg(_MOST_BYTES, _ANCILLARY, _socket.MSG_CMSG_CLOEXEC)
        if len(data) > 1:  # otherwise it is the signal's number
            state, rights = data, ancillary
            continue
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if pid == worker:
                worker = 0
                if os.waitstatus_to_exitcode(status) != IDLE_STATUS:
                    return os.waitstatus_to_exitcode(status)
                pids, fds, state, poll = _take_over(state, rights)
                poll.register(ours.fileno(), select.POLLIN)
                poll.register(theirs.fileno(), select.POLLIN)  # what it was told and didn't hear any more
            elif worker or pid in pids:
                # A worker may be about to hear what this pid means, so it is told of every one.
                ours.send(ENDED.pack(pid, status))


def _begin(
    work: Callable[[Worker], int], state: bytes, fds: list[int], ours: _socket.socket, theirs: _socket.socket
) -> int:
    """Forks a worker, which owns `fds` from here on; its pid."""
    reaper = os.getpid()
    worker = os.fork()
    if worker:
        for fd in fds:
            os.close(fd)
        return worker
    status = 1
    try:
        _libc.prctl(PR_SET_PDEATHSIG, _signal.SIGKILL, 0, 0, 0)
        if os.getppid() == reaper:  # it may have died before this process could die of that
            _libc.prctl(PR_SET_NAME, b"shoal-worker", 0, 0, 0)
            _signal.set_wakeup_fd(-1)
            ours.close()
            status = work(Worker(state, fds, theirs))
    finally:
        os._exit(status)


def _take_over(
    message: bytes, rights: list[tuple[int, int, bytes]]
) -> tuple[Sequence[int], list[int], bytes, select.poll]:
    """Of what a worker has handed over: pids, descriptors, state, and what hears that there is something to do."""
    pids, fds = _HEADER.unpack_from(message)
    numbers = struct.unpack_from(f"{pids + fds}i", message, _HEADER.size)
    kept = list(struct.unpack_from(f"{fds}i", rights[0][2])) if fds else []
    poll = select.poll()
    for fd, events in zip(kept, numbers[pids:], strict=True):
        if events:
            poll.register(fd, events)
    return numbers[:pids], kept, message[_HEADER.size + 4 * (pids + fds) :], poll


def _noted(*_: object) -> None:
    """Nothing: the byte in the pipe wakes poll(2)."""


def rehearse() -> None:
    """Goes through a reaper's whole life, with workers that do nothing.

    Whoever does this and then forks reapers spares each of them the pages that code writes to when it is first run
    (CPython 3.11 specialises instructions in place).
    """
    for _ in range(_REHEARSALS):
        wanted, wanting = os.pipe2(os.O_CLOEXEC)
        os.write(wanting, b"1")
        reap([wanted], _rehearse_work)
        _signal.set_wakeup_fd(-1)
        os.close(wanting)


def _rehearse_work(worker: Worker) -> int:
    if worker.state:
        return 0
    handover = Handover()
    handover.keep(worker.fds[0], select.POLLIN)
    return IDLE_STATUS if handover.send(worker.reaper, b"1") else 1
