"""One process of a container, the first one or an exec: its streams, its pid, and how it ended."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import time

from shoal_runtime.shim import files, protocol
from shoal_runtime.shim.logger import Logger
from shoal_runtime.shim.loop import Loop
from shoal_runtime.shim.protocol import ShimError
from shoal_runtime.shim.reaper import Handover
from shoal_runtime.shim.stdio import ConsoleSocket, Streams, Terminal, unread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Done = Callable[["ShimError | None"], None]

_FLUSH_SECONDS = 2.0
_READ_SECONDS, _LOOK_SECONDS = 1.0, 0.002
"""How long a reader may take for what is in its FIFO, and how often it is looked at."""


class Process:
    """`launch` is the OCI runtime's create, restore or exec: it is given files, or a console socket, and says when."""

    def __init__(self, loop: Loop, place: str, record: str, stdio: dict[str, Any], names: dict[str, str]) -> None:
        self._loop, self._place, self._record = loop, place, record
        self._stdio, self._names = stdio, names
        self.pid = 0
        self._pidfd = -1
        self.exit: dict[str, Any] | None = None
        self.when_exited: list[Callable[[], None]] = []
        self._streams: Streams | None = None
        self._terminal: Terminal | None = None
        self._console: ConsoleSocket | None = None
        self._logger: Logger | None = None
        self._after_flush: list[Callable[[], None]] = []

    # ------------------------------------------------------------------------------------------------------- beginning

    def launch(self, how: Callable[[dict[int, int], str, Done], None], pid_file: str, done: Done) -> None:
        """Opens the streams and has `how` start the process; `done` is called once its pid is known, or it failed."""

        def launched(error: ShimError | None) -> None:
            try:
                pid = _take_pid(pid_file)
                if error is not None and (error.code != "ABORTED" or not pid):
                    raise error
                error = None  # killed after it had written the pid, it had done everything
                if not pid:
                    raise ShimError("FAILED_PRECONDITION", "the OCI runtime wrote no pid")
                self.pid = pid
                self._open_pidfd()
                if self._console is not None and self._terminal is not None:
                    self._terminal.attach(self._console.receive())
                if self._streams is not None:
                    self._streams.handed_over()
                if self._logger is not None:
                    self._logger.close()
            except (ShimError, OSError, ValueError) as problem:
                error = problem if isinstance(problem, ShimError) else ShimError("INTERNAL", str(problem))
            finally:
                if self._console is not None:
                    self._console.close()
                    self._console = None
            done(error)
            self._loop.expected()

        def opened(error: ShimError | None) -> None:
            self._loop.expect()
            _take_pid(pid_file)  # of an attempt that somebody made who was killed
            if error is not None:
                launched(error)
                return
            try:
                if not self._stdio.get("terminal"):
                    self._streams = Streams()
                    self._streams.open(self._stdio, self._logger)
                    how(self._streams.files, "", launched)
                    return
                self._terminal = Terminal(self._loop, self._stdio, self._logger)
                self._console = ConsoleSocket(self._place)
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                try:
                    how(dict.fromkeys((0, 1, 2), null), self._console.path, launched)
                finally:
                    os.close(null)
            except ShimError as problem:
                launched(problem)
            except OSError as problem:
                launched(ShimError("FAILED_PRECONDITION", f"{problem.strerror}: {problem.filename}"))

        if Logger.is_one(self._stdio.get("stdout", "")):
            try:
                self._logger = Logger(self._loop, self._stdio["stdout"], self._names, opened)
            except ShimError as problem:
                done(problem)
        else:
            opened(None)

    def _open_pidfd(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            pass  # it has ended; how is on its way

    def watch(self, exited: Callable[[], None]) -> None:
        """Waits for the process: `exited` is called once how it ended is on disk."""

        def ended(status: int) -> None:
            self._close_pidfd()
            code = os.waitstatus_to_exitcode(status)
            self.record_exit(code if code >= 0 else 128 - code)
            exited()
            waiting, self.when_exited = self.when_exited, []
            for callback in waiting:
                callback()

        self._loop.claim(self.pid, ended)

    def record_exit(self, status: int) -> None:
        """How it ended, on disk before anyone is told; its streams end."""
        self.exit = {"pid": self.pid, "exit_status": status, "exited_at": time.time()}
        protocol.write_durably(self._place, self._record, self.exit)
        if self._streams is not None:
            self._streams.finish(self._loop)
        if self._terminal is not None:
            self._terminal.finish(self._flushed)

    # ------------------------------------------------------------------------------------------------------ operations

    def signal(self, number: int) -> None:
        """Sends a signal. NOT_FOUND when it has finished."""
        if self.exit is not None or not self.pid:
            raise ShimError("NOT_FOUND", "the process has finished" if self.exit else "the process isn't started")
        try:
            if self._pidfd < 0:
                raise ProcessLookupError
            _signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            raise ShimError("NOT_FOUND", "the process has finished") from None

    def resize(self, width: int, height: int) -> None:
        """Sets the terminal's size in characters. FAILED_PRECONDITION without a terminal."""
        if not self._stdio.get("terminal"):
            raise ShimError("FAILED_PRECONDITION", "the process has no terminal")
        if self._terminal is not None:
            self._terminal.resize(width, height)

    def close_stdin(self) -> None:
        """It reads what has been written, and then its end."""
        for held in (self._streams, self._terminal):
            if held is not None:
                held.close_stdin()

    # -------------------------------------------------------------------------------------------------------- handover

    def leave_to(self, handover: Handover) -> dict[str, Any] | None:
        """What the next worker restores it from; None while there is something to copy, to log or to wait for here."""
        copying = self._terminal is not None and not self._terminal.finished
        if copying or self._console is not None or self._logger is not None or self.when_exited or self._after_flush:
            return None
        if self.pid and self.exit is None:
            handover.pids.append(self.pid)
        return {
            "record": self._record, "stdio": self._stdio, "pid": self.pid, "exit": self.exit,
            "pidfd": handover.keep(self._pidfd) if self._pidfd >= 0 else -1,
            "streams": self._streams.leave_to(handover) if self._streams is not None else None,
        }  # fmt: skip

    def restore(self, state: dict[str, Any], fds: Sequence[int]) -> None:
        """Becomes what another worker left."""
        self.pid, self.exit = state["pid"], state["exit"]
        self._pidfd = fds[state["pidfd"]] if state["pidfd"] >= 0 else -1
        if state["streams"] is not None:
            self._streams = Streams.restored(state["streams"], fds)

    # ------------------------------------------------------------------------------------------------------------- end

    def when_flushed(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when its last words are with the client, or nobody has read them for a while."""
        if self._terminal is not None and not self._terminal.finished:
            self._after_flush.append(lambda: self._when_logged(callback))
            self._loop.after(_FLUSH_SECONDS, self._flushed)
        else:
            self._when_logged(callback)

    def _flushed(self) -> None:
        if self._terminal is not None:
            self._terminal.close()
        waiting, self._after_flush = self._after_flush, []
        for callback in waiting:
            callback()

    def _when_logged(self, callback: Callable[[], None]) -> None:
        """A client lets go of its FIFOs when it hears that the process is forgotten: what is in them is lost then."""
        self._when_read(time.monotonic() + _READ_SECONDS, callback)

    def _when_read(self, ends: float, callback: Callable[[], None]) -> None:
        if unread(self._stdio) and time.monotonic() < ends:
            self._loop.after(_LOOK_SECONDS, lambda: self._when_read(ends, callback))
            return
        self.release()
        if self._logger is not None:
            self._logger.finish(callback)
        else:
            callback()

    def release(self) -> None:
        """Lets go of every descriptor."""
        for held in (self._streams, self._terminal, self._console, self._logger):
            if held is not None:
                held.close()
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _take_pid(path: str) -> int:
    """The pid in a runtime's pid file, or 0. The file goes, and so does the one beside it that runc begins with."""
    pid = 0
    try:
        pid = int(files.read(path) or 0)
    except FileNotFoundError:
        pass
    files.unlink(path)
    files.unlink(f"{os.path.dirname(path)}/.{os.path.basename(path)}")
    return pid
