"""A shim: what supervises one container, or a group of them (a pod), and outlives the service.

The containers of a group share its processes and one loop, and nothing else: each has its own directory and its own
socket, under its own id. Whoever wants one more in the group asks on the group's socket, as the zygote is asked.
"""

from __future__ import annotations

import _socket
import marshal
import os
import select

from shoal_runtime.shim import cgroups, files, protocol
from shoal_runtime.shim.container import Container
from shoal_runtime.shim.loop import Connection, Loop, peer_is_root, serve
from shoal_runtime.shim.protocol import ShimError
from shoal_runtime.shim.reaper import IDLE_STATUS, Handover, Worker, reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

IDLE_SECONDS = 1.0
"""A worker without work for so long ends; its reaper begins another one when there is some."""


def supervise(directory: str, sock: int) -> int:
    """This process is a shim until its last container is gone; its exit status.

    `directory` is the runtime service's state. The first container is asked for on the socket `sock`.
    """

    def work(worker: Worker) -> int:
        shim = Shim(directory, worker)
        try:
            if worker.state:
                shim.restore(marshal.loads(worker.state), worker.fds)  # noqa: S302 (this very program wrote it)
            else:
                shim.begin(_socket.socket(fileno=worker.fds[0]))
            return shim.run()
        except BaseException as error:  # noqa: BLE001 (a forked child: whatever it is, it ends here)
            shim.leave_word(f"{type(error).__name__}: {error}")
            return 1

    return reap([sock], work)


class Shim:
    """The containers of a shim, in the worker that works for it now."""

    def __init__(self, directory: str, worker: Worker) -> None:
        self._directory, self._worker = directory, worker
        self._loop = Loop()
        self._loop.hear_of(worker.reaper)
        self._loop.when_idle(IDLE_SECONDS, self._hand_over)
        self._containers: list[Container] = []
        self._group = self._cgroup = ""
        self._listener: _socket.socket | None = None
        self._status = 0

    def run(self) -> int:
        """Works as long as there is something to do; how the worker is to exit."""
        self._loop.run()
        if self._status == 0 and self._cgroup:
            cgroups.leave(self._cgroup, [os.getppid(), os.getpid()])
        return self._status

    def leave_word(self, why: str) -> None:
        """Says in every container's directory why its shim ends: whoever takes the container down logs it."""
        for container in self._containers:
            try:
                protocol.write(container.place, protocol.LAST_WORD, {"why": why})
            except OSError:
                pass  # nobody will know

    def begin(self, sock: _socket.socket) -> None:
        """Hears on `sock` which container to make first."""
        if peer_is_root(sock):
            Connection(self._loop, sock, self._asked_first, self._unasked)
        else:
            self._loop.running = False

    def _asked_first(self, connection: Connection, request: dict[str, Any]) -> None:
        try:
            if request.get("op") == "create":
                os.makedirs(f"{self._directory}/shims", mode=0o700, exist_ok=True)
                if cgroup := (request.get("options") or {}).get("shim_cgroup"):
                    cgroups.join(cgroup, [os.getppid(), os.getpid()])
                    self._cgroup = cgroup
                if group := request.get("group"):
                    self._make_group(f"{self._directory}/shims/{group}{protocol.GROUP}")
            self._asked(connection, request)
        except ShimError as error:
            _refuse(connection, request, error)
        except Exception as error:  # noqa: BLE001 (whoever asked is told, whatever it is)
            _refuse(connection, request, ShimError("INTERNAL", f"shim: {type(error).__name__}: {error}"))
        if not self._containers:
            self._loop.running = False

    def _unasked(self, _: Connection) -> None:
        self._loop.running = False  # whoever wanted a shim has gone without a word

    def restore(self, state: dict[str, Any], fds: list[int]) -> None:
        """Goes on with what another worker left."""
        self._cgroup = state["cgroup"]
        for container in state["containers"]:
            self._containers.append(Container.restored(self._loop, container, fds, self._gone))
        if state["group"]:
            self._listen(state["group"], _socket.socket(fileno=fds[state["listener"]]))

    def _hand_over(self) -> None:
        if not self._containers:
            return  # the first one is still to be asked for, by somebody who takes their time
        handover = Handover()
        containers = [container.leave_to(handover) for container in self._containers]
        if None in containers:
            return
        listener = handover.keep(self._listener.fileno(), select.POLLIN) if self._listener is not None else -1
        state = {"group": self._group, "cgroup": self._cgroup, "listener": listener, "containers": containers}
        if handover.send(self._worker.reaper, marshal.dumps(state)):
            self._status = IDLE_STATUS
            self._loop.running = False

    def _make_group(self, group: str) -> None:
        beside = f"{group}.{os.getpid()}"
        os.mkdir(beside, 0o700)
        listener = protocol.listen(beside, protocol.SOCKET)
        files.remove(group)  # of a shim that died: whoever asks holds the group's lock
        os.rename(beside, group)
        self._listen(group, listener)

    def _listen(self, group: str, listener: _socket.socket) -> None:
        self._group, self._listener = group, listener
        serve(self._loop, listener, self._asked, _ignored, _ignored)

    def _asked(self, connection: Connection, message: dict[str, Any]) -> None:
        if message.get("op") != "create":
            _refuse(
                connection, message, ShimError("UNIMPLEMENTED", f"a shim makes containers, not {message.get('op')!r}")
            )
            return
        container = Container(self._loop, f"{self._directory}/shims/{message['place']}", message, self._gone)
        self._containers.append(container)
        try:
            container.serve(connection)
        except ShimError as error:
            _refuse(connection, message, error)
            self._gone(container)

    def _gone(self, container: Container) -> None:
        self._containers.remove(container)
        if self._containers:
            return
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
            files.remove(self._group)
        self._loop.running = False


def _refuse(connection: Connection, request: dict[str, Any], error: ShimError) -> None:
    connection.send({"n": request.get("n", 0), "error": error.to_wire()})
    connection.close_when_sent()


def _ignored(*_: Any) -> None:
    """Nothing: a container takes the connection over at once, or it is only waited on."""
