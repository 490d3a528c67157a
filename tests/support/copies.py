"""Copies of the test service, as processes: started, killed, counted, and gone at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.natsd import NatsServer

HERE = Path(__file__).resolve().parents[2]


class Copy:
    """One copy: a process with its log."""

    def __init__(self, server: NatsServer, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / f"{name}.log"
        environment = os.environ | {"SHOAL_NATS_URL": server.url, "PYTHONPATH": str(HERE)}
        command = [sys.executable, "-m", "tests.support.bus_service", "--node", "n1"]
        command += ["--root", str(directory / "root"), "--state", str(directory / "state"), "--log-level", "debug"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=HERE)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGKILL) -> int:
        if self.alive:
            self.process.send_signal(number)
        return self.process.wait(20)


class Copies:
    """The copies of one test."""

    def __init__(self, server: NatsServer, directory: Path) -> None:
        self.server, self.directory, self.root = server, directory, directory / "root"
        self.all: list[Copy] = []

    def start(self, count: int = 1) -> list[Copy]:
        started = [Copy(self.server, self.directory, f"copy{len(self.all) + n}") for n in range(count)]
        self.all += started
        return started

    @property
    def alive(self) -> list[Copy]:
        return [copy for copy in self.all if copy.alive]

    def log(self) -> str:
        return "\n".join(copy.log.read_text() for copy in self.all)

    def stop_all(self) -> None:
        for copy in self.all:
            copy.stop()
