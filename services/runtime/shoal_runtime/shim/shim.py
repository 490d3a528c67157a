"""A shim: the process that supervises one container, or a group of them (a pod), and outlives the service.

The containers of a group share its one process and one loop, and nothing else: each has its own directory and its own
socket, under its own id. Whoever wants one more in the group asks on the group's socket, as the zygote is asked.
"""

from __future__ import annotations

import os
import shutil
import socket
from typing import Any

from shoal_runtime.shim import cgroups, protocol
from shoal_runtime.shim.container import Container
from shoal_runtime.shim.loop import Connection, Loop, serve
from shoal_runtime.shim.protocol import ShimError


class Shim:
    """Containers in one process; it ends with the last of them. `directory` is the runtime service's state."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._loop = Loop()
        self._containers: list[Container] = []
        self._group = self._cgroup = ""
        self._listener: socket.socket | None = None

    def run(self, sock: socket.socket, request: dict[str, Any]) -> None:
        """Makes the container that `request` asks for, and serves until no container is left."""
        if group := request.get("group"):
            self._listen(f"{self._directory}/shims/{group}{protocol.GROUP}")
        if cgroup := (request.get("options") or {}).get("shim_cgroup"):
            self._cgroup = cgroup
            cgroups.join(cgroup)
        self._create(Connection(self._loop, sock, _ignored, _ignored), request)
        if self._containers:
            self._loop.run()
        if self._cgroup:
            cgroups.leave(self._cgroup)

    def _listen(self, group: str) -> None:
        beside = f"{group}.{os.getpid()}"
        os.mkdir(beside, 0o700)
        self._listener = protocol.listen(beside, protocol.SOCKET)
        shutil.rmtree(group, ignore_errors=True)  # of a shim that died: whoever asks holds the group's lock
        os.rename(beside, group)
        self._group = group
        serve(self._loop, self._listener, self._asked, _ignored, _ignored)

    def _asked(self, connection: Connection, message: dict[str, Any]) -> None:
        if message.get("op") != "create":
            error = ShimError("UNIMPLEMENTED", f"a group of containers doesn't know {message.get('op')!r}")
            connection.send({"n": message.get("n", 0), "error": error.to_wire()})
            return
        self._create(connection, message)

    def _create(self, connection: Connection, request: dict[str, Any]) -> None:
        container = Container(self._loop, f"{self._directory}/shims/{request['place']}", request, self._gone)
        self._containers.append(container)
        try:
            container.serve(connection)
        except ShimError as error:
            connection.send({"n": request.get("n", 0), "error": error.to_wire()})
            self._gone(container)

    def _gone(self, container: Container) -> None:
        self._containers.remove(container)
        if self._containers:
            return
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
            shutil.rmtree(self._group, ignore_errors=True)
        self._loop.running = False


def _ignored(*_: Any) -> None:
    """Nothing: a container takes the connection over at once, or it is only waited on."""
