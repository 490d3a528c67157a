"""One container under a shim: its rootfs, its processes, what is asked of it, and how it ends."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import os
import select

from shoal_runtime.shim import cgroups, codec, files, mounts, protocol, shortcuts, specification
from shoal_runtime.shim.loop import Connection, Loop, serve
from shoal_runtime.shim.oci import PID_FILE, OciRuntime
from shoal_runtime.shim.oom import OomWatch
from shoal_runtime.shim.process import Process
from shoal_runtime.shim.protocol import ShimError
from shoal_runtime.shim.reaper import Handover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Done = Callable[["ShimError | None"], None]

    Reply = Callable[["dict[str, Any] | ShimError"], None]

_ALL_GONE_SECONDS = 5.0
_KILLED = 137
_REMEMBERED = 7


class Exec:
    """A further process: `waiting` is who still waits for it to be started."""

    def __init__(self, process: Process, request_id: str) -> None:
        self.process, self.request_id = process, request_id
        self.waiting: list[Reply] = []


class Container:
    """Supervises one container from its creation until it is deleted; `gone` is called then.

    `place` is its directory: its socket, what it is (`shim.json`), and how its processes ended (`exit.json`,
    `exec-<id>.json`), on disk before anyone is told. It appears whole, by a rename, and goes last.
    """

    def __init__(self, loop: Loop, place: str, request: dict[str, Any], gone: Callable[[Container], None]) -> None:
        self._loop, self.place, self._request, self._gone = loop, place, request, gone
        self._namespace, self._id = request["namespace"], request["id"]
        self._bundle, self._rootfs = request["bundle"], f"{request['bundle']}/rootfs"
        options = request.get("options") or {}
        self._oci = OciRuntime(loop, request["runtime"], request["runtime_root"], self._bundle, self._id, options)
        self._init = self._process(protocol.EXIT, request["stdio"])
        self._execs: dict[str, Exec] = {}
        self._launching = 0
        self._connections: list[Connection] = []
        self._listener: _socket.socket | None = None
        self._status = "creating"
        self._oom = OomWatch(loop, lambda kills: self._tell({"event": "oom", "kills": kills}))
        self._busy = False
        self._queue: list[Callable[[], None]] = []
        self._facts = request.get("facts") or specification.facts(protocol.read_json(self._bundle, "config.json") or {})
        self._oci.has_hooks = bool(self._facts["hooks"])
        loop.adopts |= self._facts["host_pids"]
        self._signalled: list[str] = []
        self._frozen = self._deleting = False

    def _process(self, record: str, stdio: dict[str, Any]) -> Process:
        names = {"CONTAINER_ID": self._id, "CONTAINER_NAMESPACE": self._namespace}
        return Process(self._loop, self.place, record, stdio, names)

    def serve(self, first: Connection) -> None:
        """Creates the container for whoever asked (`first`), and listens for others. ALREADY_EXISTS if it is there."""
        beside = f"{self.place}.{os.getpid()}"
        os.mkdir(beside, 0o700)
        listener = protocol.listen(beside, protocol.SOCKET)
        record = {
            key: self._request.get(key, "")
            for key in ("namespace", "id", "bundle", "runtime", "runtime_root", "request_id", "group")
        }
        protocol.write(beside, protocol.RECORD, record | {"pid": os.getppid(), "version": protocol.VERSION})
        try:
            os.rename(beside, self.place)
        except OSError:
            listener.close()
            files.remove(beside)
            raise ShimError("ALREADY_EXISTS", f"container {self._id}: has a shim already") from None
        self._listen(listener)
        first.give_to(self._heard, self._connections.remove)
        self.connect(first)
        self._create(lambda result: _answer(first, self._request.get("n", 0), result))

    def _listen(self, listener: _socket.socket) -> None:
        self._listener = listener
        serve(self._loop, listener, self._heard, self.connect, self._connections.remove)

    # -------------------------------------------------------------------------------------------------------- handover

    def leave_to(self, handover: Handover) -> dict[str, Any] | None:
        """What `restored` makes the same of again, in another worker; None while something is under way."""
        assert self._listener is not None
        if self._busy or self._queue or self._launching:
            return None
        connections = [connection.leave_to(handover) for connection in self._connections]
        processes = {id: entry.process.leave_to(handover) for id, entry in self._execs.items()}
        init = self._init.leave_to(handover)
        if init is None or None in connections or None in processes.values():
            return None
        return {
            "place": self.place, "request": {k: v for k, v in self._request.items() if k != "rootfs"},
            "status": self._status, "frozen": self._frozen, "signalled": self._signalled,
            "failed": self._oci.failed,
            "listener": handover.keep(self._listener.fileno(), select.POLLIN), "connections": connections,
            "oom": self._oom.leave_to(handover), "init": init,
            "execs": {id: [entry.request_id, processes[id]] for id, entry in self._execs.items()},
        }  # fmt: skip

    @classmethod
    def restored(
        cls, loop: Loop, state: dict[str, Any], fds: Sequence[int], gone: Callable[[Container], None]
    ) -> Container:
        """The container as another worker left it."""
        container = cls(loop, state["place"], state["request"], gone)
        container._status = state["status"]
        container._frozen = state["frozen"]
        container._signalled, container._oci.failed = state["signalled"], state["failed"]
        container._init.restore(state["init"], fds)
        for id, (request_id, process) in state["execs"].items():
            entry = Exec(container._process(process["record"], process["stdio"]), request_id)
            entry.process.restore(process, fds)
            container._execs[id] = entry
            if entry.process.exit is None:
                container._watch_exec(id, entry.process)
        if container._init.pid and container._init.exit is None:
            container._init.watch(container._exited)
        container._oom.restore(state["oom"], fds)
        container._listen(_socket.socket(fileno=fds[state["listener"]]))
        for place in state["connections"]:
            sock = _socket.socket(fileno=fds[place])
            container._connections.append(Connection(loop, sock, container._heard, container._connections.remove))
        return container

    # ----------------------------------------------------------------------------------------------------- connections

    def connect(self, connection: Connection) -> None:
        """Tells a new connection who this is, and everything that has ended so far."""
        self._connections.append(connection)
        connection.send(
            {"event": "hello", "version": protocol.VERSION,
             "namespace": self._namespace, "id": self._id, "pid": self._init.pid,
             "status": self._status, "request_id": self._request["request_id"]}
        )  # fmt: skip
        if self._oom.kills:
            connection.send({"event": "oom", "kills": self._oom.kills})
        for id, entry in self._execs.items():
            if entry.process.exit is not None:
                connection.send({"event": "exit", "exec": id, **entry.process.exit})
        if self._init.exit is not None and self._status == "stopped":
            connection.send({"event": "exit", **self._init.exit})

    def _tell(self, event: dict[str, Any]) -> None:
        for connection in list(self._connections):
            connection.send(event)

    def _heard(self, connection: Connection, message: dict[str, Any]) -> None:
        number = message.get("n", 0)

        def reply(result: dict[str, Any] | ShimError) -> None:
            _answer(connection, number, result)

        operations: dict[str, Callable[[dict[str, Any], Reply], None]] = {
            "state": self._state,
            "start": self._start,
            "exec": self._exec,
            "kill": self._kill,
            "pause": self._pause,
            "resume": self._resume,
            "update": self._update,
            "checkpoint": self._checkpoint,
            "resize": self._resize,
            "close_stdin": self._close_stdin,
            "delete_exec": self._delete_exec,
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
            reply(ShimError(error.code, f"{self._name(message)}: {error.message}", error.hint))
        except OSError as error:
            reply(ShimError("INTERNAL", f"{error.strerror}: {error.filename or message.get('op')}"))
        except Exception as error:  # noqa: BLE001 (what one request is wrong with must not end the container)
            reply(ShimError("INTERNAL", f"{message.get('op')}: {type(error).__name__}: {error}"))

    def _name(self, message: dict[str, Any]) -> str:
        exec_id = message.get("exec", "")
        return f"container {self._id}, exec {exec_id}" if exec_id else f"container {self._id}"

    def _exclusively(self, reply: Reply, work: Callable[[Done], None]) -> None:
        """Runs `work` when no other operation on the container is under way, and replies with what it ends with."""

        def begin() -> None:
            self._busy = True
            try:
                work(end)
            except (ShimError, OSError) as problem:
                end(problem if isinstance(problem, ShimError) else ShimError("INTERNAL", str(problem)))

        def end(error: ShimError | None = None) -> None:
            self._busy = False
            reply(error if error is not None else {"pid": self._init.pid})
            self._next()

        self._queue.append(begin)
        if not self._busy:
            self._next()

    def _next(self) -> None:
        if self._queue and not self._busy:
            self._queue.pop(0)()

    def _process_of(self, message: dict[str, Any]) -> Process:
        exec_id = message.get("exec", "")
        if not exec_id:
            return self._init
        if exec_id not in self._execs:
            raise ShimError("NOT_FOUND", "there is no such process")
        return self._execs[exec_id].process

    # -------------------------------------------------------------------------------------------------------- creation

    def _create(self, reply: Reply) -> None:
        def failed(error: ShimError) -> None:
            """Undoes everything, and leaves."""

            def deleted(_: ShimError | None) -> None:
                self._init.release()
                mounts.unmount_all(self._rootfs)
                self._leave(lambda: reply(error))

            self._oci.delete(True, deleted)

        def created(error: ShimError | None) -> None:
            if error is not None:
                failed(error)
                return
            self._status = "created"
            reply({"pid": self._init.pid})
            self._follow()
            self._busy = False
            self._next()

        self._busy = True
        try:
            os.makedirs(self._rootfs, exist_ok=True)
            mounts.mount_all(self._request["rootfs"], self._rootfs)
        except (ShimError, OSError) as problem:
            text = f"{problem.strerror}: {problem.filename}" if isinstance(problem, OSError) else str(problem)
            failed(problem if isinstance(problem, ShimError) else ShimError("FAILED_PRECONDITION", text))
            return
        if self._request.get("checkpoint"):
            created(None)  # starting it is what restores it
        else:
            self._init.launch(self._oci.create, f"{self._bundle}/{PID_FILE}", self._recorded(created))

    def _recorded(self, done: Done) -> Done:
        """`done`, after it is on disk which process is the first: who cleans up after a dead shim has to know."""

        def launched(error: ShimError | None) -> None:
            try:
                if error is None:
                    started = protocol.start_time(self._init.pid)
                    protocol.write(self.place, protocol.INIT, {"pid": self._init.pid, "started": started})
            except OSError as problem:
                error = ShimError("INTERNAL", str(problem))
            done(error)

        return launched

    def _follow(self) -> None:
        """Hears of the first process's end, and of OOM kills."""
        if self._init.pid:
            self._oom.follow(cgroups.of(self._init.pid))
            self._init.watch(self._exited)

    def _state(self, message: dict[str, Any], reply: Reply) -> None:
        process = self._process_of(message)
        status = self._status
        if message.get("exec"):
            status = "stopped" if process.exit is not None else "running"
        reply({"status": status, "pid": process.pid, "request_id": self._request["request_id"]})

    # ----------------------------------------------------------------------------------------------------------- start

    def _start(self, _: dict[str, Any], reply: Reply) -> None:
        def start(end: Done) -> None:
            def done(error: ShimError | None) -> None:
                if error is None and self._status == "created":
                    self._status = "running"
                end(error)

            def restored(error: ShimError | None) -> None:
                done(error)
                self._follow()

            if self._status != "created":
                done(ShimError("FAILED_PRECONDITION", f"container {self._id}: is {self._status}, not created"))
            elif images := self._request.get("checkpoint"):
                self._init.launch(
                    lambda files, console, launched: self._oci.restore(images, files, console, launched),
                    f"{self._bundle}/{PID_FILE}",
                    self._recorded(restored),
                )
            elif "poststart" not in self._facts["hooks"] and os.path.exists(f"{self._oci.place}/{shortcuts.FIFO}"):
                shortcuts.start(self._loop, self._oci, self._init, self._or_is("running", done))
            else:
                self._oci.start(self._or_is("running", done))

        self._exclusively(reply, start)

    def _or_is(self, status: str, end: Done) -> Done:
        """`end`; but a runtime that was killed may have done what it was asked to: the container is `status` then."""

        def done(error: ShimError | None) -> None:
            if error is None or error.code != "ABORTED":
                end(error)
            else:
                self._oci.state(lambda found: end(None if found == status else error))

        return done

    def _exec(self, message: dict[str, Any], reply: Reply) -> None:
        """Starts a further process; asked again by the same request, it answers with what that started."""
        id, request_id = message["exec"], message["request_id"]
        known = self._execs.get(id)
        if known is not None:
            if known.request_id != request_id:
                raise ShimError("ALREADY_EXISTS", "has been started already")
            if known.process.pid:
                reply({"pid": known.process.pid})
            else:
                known.waiting.append(reply)
            return
        if self._status not in ("running", "created") or self._deleting or self._init.exit is not None:
            status = "being deleted" if self._deleting else "stopped" if self._init.exit is not None else self._status
            raise ShimError("FAILED_PRECONDITION", f"container {self._id} is {status}")
        record = f"{protocol.EXEC}{id}.json"
        entry = Exec(self._process(record, message["stdio"]), request_id)
        entry.waiting.append(reply)
        self._execs[id] = entry
        description, pid_file = f"{self._bundle}/.exec-{id}.json", f"{self._bundle}/.exec-{id}.pid"

        def started(error: ShimError | None) -> None:
            self._launching -= 1
            files.unlink(description)
            if error is None:
                protocol.write(self.place, record, {"pid": entry.process.pid})
            else:
                entry.process.release()
                del self._execs[id]
                self._exited_meanwhile()
            for waiting in entry.waiting:
                waiting(error if error is not None else {"pid": entry.process.pid})
            if error is None:
                self._watch_exec(id, entry.process)
                self._exited_meanwhile()
            self._next()

        self._launching += 1
        files.write(description, codec.dumps(message["process"]))
        entry.process.launch(
            lambda files, console, done: self._oci.exec(description, pid_file, files, console, done), pid_file, started
        )

    def _watch_exec(self, id: str, process: Process) -> None:
        process.watch(lambda: self._tell({"event": "exit", "exec": id, **(process.exit or {})}))

    # ------------------------------------------------------------------------------------------------ while it is there

    def _kill(self, message: dict[str, Any], reply: Reply) -> None:
        """Sends a signal; asked again by the same request, it has been sent, whatever has become of the process."""
        number, request_id = int(message["signal"]), message.get("request_id", "")
        if request_id and request_id in self._signalled:
            reply({})
            return

        def signalled(result: dict[str, Any] | ShimError) -> None:
            if not isinstance(result, ShimError):
                self._signalled = [*self._signalled[-_REMEMBERED:], request_id]
            reply(result)

        if message.get("all"):
            self._exclusively(signalled, lambda end: self._oci.kill(number, True, self._then_thaw(number, end)))
            return
        process = self._process_of(message)
        process.signal(number)
        if self._status == "paused" and number == _signal.SIGKILL:
            # A frozen process of cgroup v1 dies only once it is thawed.
            self._resume(message, signalled)
        else:
            signalled({})

    def _then_thaw(self, number: int, end: Done) -> Done:
        def killed(error: ShimError | None) -> None:
            if error is None and self._status == "paused" and number == _signal.SIGKILL:
                self._oci.resume(self._turned("running", end))
            else:
                end(error)

        return killed

    def _turned(self, status: str, end: Done) -> Done:
        def done(error: ShimError | None) -> None:
            if error is None and status == "running":
                self._frozen = False
            if error is None and self._status != "stopped":
                self._status = status
            end(error)

        return done

    def _pause(self, _: dict[str, Any], reply: Reply) -> None:
        def pause(end: Done) -> None:
            if self._status == "paused":
                end(None)
                return
            self._require("running")
            self._frozen = True  # from now on it may be, also if it ends meanwhile
            self._oci.pause(self._or_is("paused", self._turned("paused", end)))

        self._exclusively(reply, pause)

    def _resume(self, _: dict[str, Any], reply: Reply) -> None:
        def resume(end: Done) -> None:
            if self._status == "running":
                end(None)
                return
            self._require("paused")
            self._oci.resume(self._or_is("running", self._turned("running", end)))

        self._exclusively(reply, resume)

    def _require(self, *statuses: str) -> None:
        if self._status not in statuses:
            raise ShimError("FAILED_PRECONDITION", f"container {self._id}: is {self._status}, not {statuses[0]}")

    def _update(self, message: dict[str, Any], reply: Reply) -> None:
        def update(end: Done) -> None:
            self._require("running", "created", "paused")
            path = f"{self._bundle}/.resources.json"
            files.write(path, codec.dumps(message["resources"]))

            def updated(error: ShimError | None) -> None:
                os.unlink(path)
                end(error)

            self._oci.update(path, updated)

        self._exclusively(reply, update)

    def _checkpoint(self, message: dict[str, Any], reply: Reply) -> None:
        def checkpoint(end: Done) -> None:
            self._require("running", "paused")
            self._oci.checkpoint(message["path"], list(message["flags"]), end)

        self._exclusively(reply, checkpoint)

    def _resize(self, message: dict[str, Any], reply: Reply) -> None:
        self._process_of(message).resize(int(message["width"]), int(message["height"]))
        reply({})

    def _close_stdin(self, message: dict[str, Any], reply: Reply) -> None:
        self._process_of(message).close_stdin()
        reply({})

    # -------------------------------------------------------------------------------------------------------- deletion

    def _delete_exec(self, message: dict[str, Any], reply: Reply) -> None:
        id = message["exec"]
        process = self._process_of(message)
        if process.exit is None:
            if not message.get("force"):
                raise ShimError("FAILED_PRECONDITION", "is running", "kill it first")
            process.when_exited.append(lambda: self._forget_exec(id, process, reply))
            self._kill({"exec": id, "signal": _signal.SIGKILL}, lambda _: None)
            return
        self._forget_exec(id, process, reply)

    def _forget_exec(self, id: str, process: Process, reply: Reply) -> None:
        def flushed() -> None:
            self._execs.pop(id, None)
            files.unlink(f"{self.place}/{protocol.EXEC}{id}.json")
            reply({"exit": process.exit})

        process.when_flushed(flushed)

    def _delete(self, message: dict[str, Any], reply: Reply) -> None:
        force = bool(message.get("force"))

        def delete(end: Done) -> None:
            if self._launching:  # an exec is just being started: its turn first
                self._busy = False
                self._queue.insert(0, lambda: self._again(delete, end))
                return
            if self._init.exit is None and not force:
                self._require("created", "stopped")
            self._deleting = True

            def deleted(error: ShimError | None) -> None:
                if error is not None and error.code != "NOT_FOUND" and "does not exist" not in error.message:
                    self._deleting = False
                    end(error)
                    return
                if not self._init.pid:
                    self._init.record_exit(_KILLED)  # it was to be restored, and never was
                self._when_exited(lambda: self._when_all_flushed(gone))

            def gone() -> None:
                mounts.unmount_all(self._rootfs)
                exit = self._init.exit
                self._leave(lambda: reply({"exit": exit}))

            if self._frozen:  # a runtime takes it for paused, though it has ended, and what is frozen doesn't die
                self._oci.resume(lambda _: self._oci.delete(self._init.exit is None, deleted))
            elif self._init.exit is not None and self._forget():
                deleted(None)
            else:
                self._oci.delete(self._init.exit is None, deleted)

        def ended(result: dict[str, Any] | ShimError) -> None:
            reply(result)

        self._exclusively(ended, delete)

    def _forget(self) -> bool:
        """Deletes a stopped container without starting its runtime; whether nothing is left of it.

        Only where no process can be left, nothing is to be run, and nothing else is to be undone.
        """
        facts = self._facts
        return facts["own_pids"] and "poststop" not in facts["hooks"] and shortcuts.forget(self._oci)

    def _again(self, work: Callable[[Done], None], end: Done) -> None:
        self._busy = True
        work(end)

    def _when_exited(self, callback: Callable[[], None]) -> None:
        if self._init.exit is not None:
            callback()
            return
        self._init.when_exited.append(callback)
        # A runtime that says "deleted" has killed it; one that lies doesn't keep us for ever.
        self._loop.after(_ALL_GONE_SECONDS, self._kill_for_sure)

    def _kill_for_sure(self) -> None:
        if self._init.exit is None:
            try:
                self._init.signal(_signal.SIGKILL)
            except ShimError:
                pass  # it has just ended

    def _when_all_flushed(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once every process has ended and its last words are with its client."""
        waited = [entry.process for entry in self._execs.values()] + [self._init]
        left = len(waited)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if not left:
                callback()

        for process in waited:
            if process.exit is None:
                process.when_exited.append(lambda process=process: process.when_flushed(one_less))  # type: ignore[misc]
            else:
                process.when_flushed(one_less)

    def _exited_meanwhile(self) -> None:
        """Tells of the first process's end, if that came while execs were being started, once none is any more."""
        if self._init.exit is not None and self._status != "stopped":
            self._exited()

    def _exited(self) -> None:
        if self._launching:
            return  # nothing of a container begins once it is told to have ended
        if self._facts["own_pids"]:
            self._told_ended()
            return

        # Nobody else ends what the first process left behind where the kernel doesn't.
        def kill(end: Done) -> None:
            self._oci.kill(_signal.SIGKILL, True, end)

        if self._busy or self._queue:  # what is under way may wait to hear of it
            self._told_ended()
            self._exclusively(lambda _: None, kill)
        else:
            self._exclusively(lambda _: self._told_ended(), kill)

    def _told_ended(self) -> None:
        assert self._init.exit is not None
        self._oom.look()  # what killed it is told before that it is dead
        self._status = "stopped"
        self._tell({"event": "exit", **self._init.exit})

    def _leave(self, answer: Callable[[], None]) -> None:
        """Removes the directory, then answers: whoever hears it finds nothing of this container any more."""
        self._oom.close()
        away = f"{self.place}.{os.getpid()}"
        try:
            os.rename(self.place, away)  # whole, or gone, whoever is killed
        except FileNotFoundError:
            pass
        files.remove(away)
        answer()
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
        for connection in list(self._connections):
            connection.send({"event": "bye"})
            connection.close_when_sent()
        self._gone(self)


def _answer(connection: Connection, number: int, result: dict[str, Any] | ShimError) -> None:
    if isinstance(result, ShimError):
        connection.send({"n": number, "error": result.to_wire()})
    else:
        connection.send({"n": number, **result})
