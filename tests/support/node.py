"""A node for tests: nats-server and any of the services, as real processes, each killed and started at will."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.support.natsd import NatsServer
from tests.support.nursery import Born, nursery

READY = "service.ready"
START_SECONDS = 60.0  # a disk that others write to may take half of it for one sync


class ServiceProcess:
    """One copy of one service. `start` returns when it answers; `kill` is a `kill -9`."""

    def __init__(self, name: str, copy: int, node: TestNode, *arguments: str, module: str = "") -> None:
        self.name, self.copy, self._node, self._arguments = name, copy, node, arguments
        self._module = module or f"shoal_{name}"
        self.log = node.directory / f"{name}-{copy}.log"
        self._process: Born | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        offset = self.log.stat().st_size if self.log.exists() else 0
        arguments = [*self._node.arguments, *self._arguments]
        self._process = nursery().start(self._module, arguments, self._node.environment, self.log)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if READY.encode() in self.log.read_bytes()[offset:]:
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        how = self._process.poll()
        raise AssertionError(f"{self.name} didn't start (status {how}):\n{self.log.read_text()[-4000:]}")

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, and the corpse reaped."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(30)
        self._process = None
        return status


class TestNode:
    """nats-server with services on it, under one directory. Leaving the block kills what still runs."""

    __test__ = False

    def __init__(self, directory: Path, natsd: NatsServer, *, name: str = "test-node", path: str = "") -> None:
        self.directory, self.natsd, self.name = directory, natsd, name
        self.root, self.state = directory / "root", directory / "state"
        self.services: list[ServiceProcess] = []
        self.environment = dict(os.environ)
        if path:
            self.environment["PATH"] = path

    @property
    def arguments(self) -> list[str]:
        return [
            "--node", self.name, "--root", str(self.root), "--state", str(self.state), "--nats-url", self.natsd.url,
        ]  # fmt: skip

    def start(self, *names: str, arguments: tuple[str, ...] = (), module: str = "") -> list[ServiceProcess]:
        """Starts a further copy of each service named; of one that isn't shoal's own, `module` says what it is."""
        started = []
        for name in names:
            copy = sum(s.name == name for s in self.services)
            service = ServiceProcess(name, copy, self, *arguments, module=module)
            self.services.append(service)
            service.start()
            started.append(service)
        return started

    def of(self, name: str, copy: int = 0) -> ServiceProcess:
        return next(s for s in self.services if s.name == name and s.copy == copy)

    def __enter__(self) -> TestNode:
        return self

    def __exit__(self, *_: object) -> None:
        for service in self.services:
            if service.running:
                service.signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        for service in self.services:
            while service.running and time.monotonic() < deadline:
                time.sleep(0.02)
        for service in self.services:
            if service.running:
                service.signal(signal.SIGKILL)
        for service in self.services:
            service.kill()
