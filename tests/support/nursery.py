"""Starts services as forks of one process that has loaded what they need: half of a short test was their imports.

What runs in the fork is what `python -m shoal_content …` runs, in a session of its own.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LOADED = (
    "shoal_content.service", "shoal_gateway.server", "shoal_network.service", "shoal_runtime.service",
    "shoal_snapshot.service", "shoal_bus.process", "uvloop",
)  # fmt: skip
_LARGEST = 1 << 18
_LOOK_SECONDS = 0.005


class Born:
    """A process that the nursery has forked, to be used as a `subprocess.Popen` is."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery, self.pid = nursery, pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Its exit status, or a signal's number below zero; None while it runs."""
        if self._status is None:
            self._status = self._nursery.ask({"poll": self.pid})["status"]
        return self._status

    def wait(self, timeout: float) -> int:
        ends = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_LOOK_SECONDS)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Nursery:
    """The process that forks. It ends with the one that has started it, and everything it has forked with it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.support.nursery", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        self._socket, self._lock = ours, threading.Lock()

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Born:
        """Runs a module as `__main__`; what it prints goes to the end of `log`."""
        log.touch()
        asked = {
            "run": module, "arguments": list(arguments), "environment": dict(environment), "log": str(log),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        }  # fmt: skip
        return Born(self, self.ask(asked)["pid"])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, and its answer."""
        with self._lock:
            self._socket.send(json.dumps(request).encode())
            answer: dict[str, Any] = json.loads(self._socket.recv(_LARGEST))
            return answer


@functools.cache
def nursery() -> Nursery:
    """This process's own."""
    return Nursery()


def _serve(asking: socket.socket) -> dict[str, Any]:
    """Answers until there is nobody who asks; in a fork, it returns what that is to run."""
    ended: dict[int, int] = {}
    while data := asking.recv(_LARGEST):
        request = json.loads(data)
        if "poll" in request:
            pid = request["poll"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            asking.send(json.dumps({"status": ended.get(pid)}).encode())
            continue
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            asking.close()
            request["parent"] = parent
            return request  # type: ignore[no-any-return]
        ended.pop(pid, None)  # of one that had this pid before: a whole run of the tests goes through all there are
        asking.send(json.dumps({"pid": pid}).encode())
    sys.exit()


def _become(request: dict[str, Any]) -> None:
    from shoal_bus.forks import die_with
    from shoal_cli import forks

    os.setsid()
    die_with(request["parent"])
    resource.setrlimit(resource.RLIMIT_NOFILE, request["files"])
    os.environ.clear()
    os.environ.update(request["environment"])
    output = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    forks.take_streams(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), output, output, lines=True)
    forks.name(request["run"].replace("_", "-"), " ".join(["python", "-m", request["run"], *request["arguments"]]))
    sys.argv = [request["run"], *request["arguments"]]
    runpy.run_module(request["run"], run_name="__main__", alter_sys=True)


def main() -> None:
    from shoal_cli import forks

    forks.load(*_LOADED)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
