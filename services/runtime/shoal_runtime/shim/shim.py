"""The shim of one container: mounts its rootfs, runs the OCI runtime, holds its streams, records and tells its exit."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from shoal_runtime.shim import mounts, protocol
from shoal_runtime.shim.loop import Connection, Loop, peer_is_root
from shoal_runtime.shim.oci import PID_FILE, OciRuntime
from shoal_runtime.shim.protocol import ShimError
from shoal_runtime.shim.stdio import ConsoleSocket, Streams, Terminal

_FLUSH_SECONDS = 2.0
_ALL_GONE_SECONDS = 5.0

Reply = Callable[[dict[str, Any] | ShimError], None]


class Shim:
    """Supervises one container from its creation until it is deleted.

    `place` is the shim's directory: its socket, what it supervises (`shim.json`), and how that ended (`exit.json`, on
    disk before anyone is told). It appears whole, by a rename, and goes last.
    """

    def __init__(self, place: str, request: dict[str, Any]) -> None:
        self._place = place
        self._namespace, self._id = request["namespace"], request["id"]
        self._bundle, self._rootfs = request["bundle"], f"{request['bundle']}/rootfs"
        self._request = request
        self._loop = Loop()
        self._oci = OciRuntime(self._loop, request["runtime"], request["runtime_root"], self._bundle, self._id)
        self._connections: list[Connection] = []
        self._streams: Streams | None = None
        self._terminal: Terminal | None = None
        self._console: ConsoleSocket | None = None
        self._pid = 0
        self._status = "creating"
        self._exit: dict[str, Any] | None = None
        self._waiting: list[Callable[[], None]] = []
        self._busy = False
        self._queue: list[Callable[[], None]] = []
        self._after_flush: list[Callable[[], None]] = []
        self._shares_pids, self._has_hooks = False, False

    def serve(self, first: socket.socket, initial: bytes) -> None:
        """Creates the container for whoever asked (`first`), and serves until it is deleted."""
        beside = f"{self._place}.{os.getpid()}"
        os.mkdir(beside, 0o700)
        listener = protocol.listen(beside, protocol.SOCKET)
        record = {
            key: self._request[key] for key in ("namespace", "id", "bundle", "runtime", "runtime_root", "request_id")
        }
        protocol.write(beside, protocol.RECORD, record | {"pid": os.getpid(), "version": protocol.VERSION})
        try:
            os.rename(beside, self._place)
        except OSError:
            shutil.rmtree(beside)
            raise ShimError("ALREADY_EXISTS", f"container {self._id}: has a shim already") from None
        self._loop.watch(listener.fileno(), select.POLLIN, lambda _: self._accept(listener))
        connection = self._connect(first, initial)
        self._create(lambda result: self._answer(connection, self._request.get("n", 0), result))
        self._loop.run()

    # ----------------------------------------------------------------------------------------------------- connections

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if not peer_is_root(sock):
            sock.close()
            return
        self._connect(sock, b"")

    def _connect(self, sock: socket.socket, initial: bytes) -> Connection:
        connection = Connection(self._loop, sock, self._heard, self._connections.remove)
        self._connections.append(connection)
        connection.send(
            {"event": "hello", "version": protocol.VERSION,
             "namespace": self._namespace, "id": self._id, "pid": self._pid,
             "status": self._status, "request_id": self._request["request_id"]}
        )  # fmt: skip
        if self._exit is not None:
            connection.send({"event": "exit", **self._exit})
        if initial:
            connection.feed(initial)
        return connection

    def _answer(self, connection: Connection, number: int, result: dict[str, Any] | ShimError) -> None:
        if isinstance(result, ShimError):
            connection.send({"n": number, "error": result.to_wire()})
        else:
            connection.send({"n": number, **result})

    def _heard(self, connection: Connection, message: dict[str, Any]) -> None:
        number = message.get("n", 0)

        def reply(result: dict[str, Any] | ShimError) -> None:
            self._answer(connection, number, result)

        operations: dict[str, Callable[[dict[str, Any], Reply], None]] = {
            "state": self._state,
            "start": self._start,
            "kill": self._kill,
            "resize": self._resize,
            "close_stdin": self._close_stdin,
            "delete": self._delete,
        }
        operation = operations.get(str(message.get("op")))
        if operation is None:
            reply(
                ShimError("UNIMPLEMENTED", f"this shim (version {protocol.VERSION}) doesn't know {message.get('op')!r}")
            )
            return
        try:
            operation(message, reply)
        except ShimError as error:
            reply(error)
        except OSError as error:
            reply(ShimError("INTERNAL", f"{error.strerror}: {error.filename or message.get('op')}"))

    # ------------------------------------------------------------------------------------------------------ operations

    def _exclusively(self, work: Callable[[Callable[[], None]], None]) -> None:
        """Runs `work` when no other operation on the container is under way; it calls what it is given at its end."""

        def begin() -> None:
            self._busy = True
            work(end)

        def end() -> None:
            self._busy = False
            if self._queue:
                self._queue.pop(0)()

        if self._busy:
            self._queue.append(begin)
        else:
            begin()

    def _create(self, reply: Reply) -> None:
        def failed(error: ShimError) -> None:
            """Undoes everything, and leaves."""

            def gone(_: ShimError | None) -> None:
                self._release()
                mounts.unmount_all(self._rootfs)
                self._leave(lambda: reply(error))

            self._oci.delete(True, gone)

        def created(error: ShimError | None) -> None:
            try:
                if error is not None:
                    raise error
                with open(f"{self._bundle}/{PID_FILE}", encoding="ascii") as file:
                    self._pid = int(file.read())
                protocol.write(
                    self._place, protocol.INIT, {"pid": self._pid, "started": protocol.start_time(self._pid)}
                )
                if self._console is not None and self._terminal is not None:
                    self._terminal.attach(self._console.receive())
            except (ShimError, OSError, ValueError) as problem:
                failed(problem if isinstance(problem, ShimError) else ShimError("INTERNAL", str(problem)))
                return
            finally:
                if self._console is not None:
                    self._console.close()
                    self._console = None
            if self._streams is not None:
                self._streams.handed_over()
            self._status = "created"
            reply({"pid": self._pid})
            self._loop.claim(self._pid, self._exited)

        def create(end: Callable[[], None]) -> None:
            stdio = self._request["stdio"]

            def finished(error: ShimError | None) -> None:
                created(error)
                end()

            try:
                self._read_specification()
                os.makedirs(self._rootfs, exist_ok=True)
                mounts.mount_all(self._request["rootfs"], self._rootfs)
                if stdio.get("terminal"):
                    self._terminal = Terminal(self._loop, stdio.get("stdin", ""), stdio.get("stdout", ""))
                    self._console = ConsoleSocket(self._place)
                    null = {fd: os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) for fd in (0, 1, 2)}
                    try:
                        self._oci.create(null, self._console.path, finished)
                    finally:
                        for fd in null.values():
                            os.close(fd)
                else:
                    self._streams = Streams(stdio.get("stdin", ""), stdio.get("stdout", ""), stdio.get("stderr", ""))
                    self._oci.create(self._streams.files, "", finished)
            except (ShimError, OSError) as problem:
                text = f"{problem.strerror}: {problem.filename}" if isinstance(problem, OSError) else str(problem)
                failed(problem if isinstance(problem, ShimError) else ShimError("FAILED_PRECONDITION", text))
                end()

        self._exclusively(create)

    def _read_specification(self) -> None:
        """What of the OCI specification matters here."""
        spec = protocol.read_json(self._bundle, "config.json") or {}
        namespaces = (spec.get("linux") or {}).get("namespaces") or []
        self._shares_pids = not any(n.get("type") == "pid" and not n.get("path") for n in namespaces)
        self._has_hooks = bool((spec.get("hooks") or {}).get("poststart"))

    def _state(self, _: dict[str, Any], reply: Reply) -> None:
        reply({"status": self._status, "pid": self._pid, "request_id": self._request["request_id"]})

    def _start(self, _: dict[str, Any], reply: Reply) -> None:
        def start(end: Callable[[], None]) -> None:
            def done(error: ShimError | None) -> None:
                if error is None and self._status == "created":
                    self._status = "running"
                reply(error if error is not None else {"pid": self._pid})
                end()

            if self._status != "created":
                done(ShimError("FAILED_PRECONDITION", f"container {self._id}: is {self._status}, not created"))
            elif self._oci.is_runc and not self._has_hooks and os.path.exists(self._oci.exec_fifo):
                self._start_by_fifo(done)
            else:
                self._oci.start(done)

        self._exclusively(start)

    def _start_by_fifo(self, done: Callable[[ShimError | None], None]) -> None:
        """What `runc start` does, without starting runc: reads the FIFO that the first process waits to write to."""
        fd = os.open(self._oci.exec_fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

        def finish(error: ShimError | None) -> None:
            self._loop.forget(fd)
            os.close(fd)
            if exited in self._waiting:
                self._waiting.remove(exited)
            done(error)

        def written(_: int) -> bool:
            try:
                data = os.read(fd, 16)
            except BlockingIOError:
                return False
            if data:
                os.unlink(self._oci.exec_fifo)
                finish(None)
            return bool(data)

        def exited() -> None:
            # It may have been started and be done already, faster than the FIFO was read.
            if not written(0):
                finish(
                    ShimError("FAILED_PRECONDITION", f"container {self._id}: its process ended before it was started")
                )

        self._waiting.append(exited)
        self._loop.watch(fd, select.POLLIN, lambda events: (written(events), None)[1])

    def _kill(self, message: dict[str, Any], reply: Reply) -> None:
        number, everything = int(message["signal"]), bool(message.get("all"))
        if not everything:
            if self._exit is not None or not self._pid:
                raise ShimError("NOT_FOUND", f"container {self._id}: the process has finished")
            # Ours to reap, and not reaped: the pid can't be somebody else's.
            os.kill(self._pid, number)
            reply({})
            return

        def kill(end: Callable[[], None]) -> None:
            def done(error: ShimError | None) -> None:
                reply(error if error is not None else {})
                end()

            self._oci.kill(number, True, done)

        self._exclusively(kill)

    def _resize(self, message: dict[str, Any], reply: Reply) -> None:
        if self._terminal is None:
            raise ShimError("FAILED_PRECONDITION", f"container {self._id}: has no terminal")
        self._terminal.resize(int(message["width"]), int(message["height"]))
        reply({})

    def _close_stdin(self, _: dict[str, Any], reply: Reply) -> None:
        if self._streams is not None:
            self._streams.close_stdin()
        if self._terminal is not None:
            self._terminal.close_stdin()
        reply({})

    def _delete(self, message: dict[str, Any], reply: Reply) -> None:
        force = bool(message.get("force"))

        def delete(end: Callable[[], None]) -> None:
            if self._exit is None and not force and self._status != "created":
                reply(ShimError("FAILED_PRECONDITION", f"container {self._id}: is {self._status}", "kill it first"))
                end()
                return

            def deleted(error: ShimError | None) -> None:
                if error is not None and error.code != "NOT_FOUND" and "does not exist" not in error.message:
                    reply(error)
                    end()
                    return
                self._when_exited(lambda: self._when_flushed(gone))

            def gone() -> None:
                self._release()
                mounts.unmount_all(self._rootfs)
                assert self._exit is not None
                exit = self._exit
                self._leave(lambda: reply({"exit": exit}))

            self._oci.delete(self._exit is None, deleted)

        self._exclusively(delete)

    # -------------------------------------------------------------------------------------------------------- the exit

    def _when_exited(self, callback: Callable[[], None]) -> None:
        if self._exit is not None:
            callback()
            return
        self._waiting.append(callback)
        # A runtime that says "deleted" has killed it; one that lies doesn't keep us for ever.
        self._loop.after(_ALL_GONE_SECONDS, lambda: os.kill(self._pid, signal.SIGKILL) if self._exit is None else None)

    def _exited(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        self._exit = {
            "pid": self._pid,
            "exit_status": code if code >= 0 else 128 - code,
            "exited_at": time.time(),
        }
        protocol.write_durably(self._place, protocol.EXIT, self._exit)
        self._status = "stopped"
        if self._streams is not None:
            self._streams.finish(self._loop)
        if self._terminal is not None:
            self._terminal.finish(self._flushed)
        for connection in list(self._connections):
            connection.send({"event": "exit", **self._exit})
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()
        if self._shares_pids:
            # Nobody else ends what the first process left behind where the kernel doesn't.
            self._exclusively(lambda end: self._oci.kill(signal.SIGKILL, True, lambda _: end()))

    def _when_flushed(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when the terminal's last words are with the client, or nobody has read them for a while."""
        if self._terminal is None or self._terminal.finished:
            callback()
            return
        self._after_flush.append(callback)
        self._loop.after(_FLUSH_SECONDS, self._flushed)

    def _flushed(self) -> None:
        if self._terminal is not None:
            self._terminal.close()
        waiting, self._after_flush = self._after_flush, []
        for callback in waiting:
            callback()

    def _release(self) -> None:
        for held in (self._streams, self._terminal, self._console):
            if held is not None:
                held.close()

    def _leave(self, answer: Callable[[], None]) -> None:
        """Removes the directory, then answers: whoever hears it finds nothing of this container any more."""
        shutil.rmtree(self._place, ignore_errors=True)
        answer()
        for connection in self._connections:
            connection.send({"event": "bye"})
        self._loop.running = False
