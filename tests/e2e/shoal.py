"""A node as its users have it: `shoal up` as a process, and the `shoal` command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
COMMAND = [sys.executable, "-I", "-m", "shoal_cli"]


class Shoal:
    """`shoal up` with root and state below a directory. Leaving the block stops it and all its containers."""

    def __init__(self, directory: Path, *, node: str = "e2e") -> None:
        self.directory, self.node = directory, node
        self.root, self.state = directory / "root", directory / "state"
        self.log = directory / "up.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._offset = 0
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
        self.environment = clean | {"SHOAL_STATE": str(self.state), "COLUMNS": "200", "TERM": "xterm"}

    def up(self, *arguments: str, command: str = "up") -> None:
        """Starts the node; returns when it is up."""
        places = ["--root", str(self.root), "--state", str(self.state)]
        name = ["--node", self.node] if command == "up" else []
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, command, *name, *places, *arguments],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.wait_for("node.up", START_SECONDS)

    def records(self) -> list[dict[str, Any]]:
        """The log lines of the newest start."""
        lines = self.log.read_bytes()[self._offset :].splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"\n")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [record for record in self.records() if record.get("event") == name]

    def wait_for(self, event: str, seconds: float, *, times: int = 1, **fields: Any) -> dict[str, Any]:
        """The log line of that event, the `times`-th one whose fields are these."""
        deadline = time.monotonic() + seconds
        while True:
            found = [r for r in self.events(event) if all(r.get(key) == value for key, value in fields.items())]
            if len(found) >= times:
                return found[times - 1]
            assert self._process is not None
            if self._process.poll() is not None:
                self._process = None
                raise AssertionError(f"the node ended:\n{self.log.read_text()[-6000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {event}:\n{self.log.read_text()[-6000:]}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def pids(self) -> dict[str, int]:
        """The services' process ids as they were when the node came up."""
        pids: dict[str, int] = self.events("node.up")[-1]["pids"]
        return pids

    def stop(self, number: int = signal.SIGINT) -> int:
        """Stops the node as Ctrl-C does; its exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        status = self._process.wait(60)
        self._process = None
        return status

    def kill(self) -> None:
        """`kill -9` of `shoal up`."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)
        self._process = None

    def run(
        self, *arguments: str, stdin: bytes | None = None, timeout: float = 90, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """One `shoal` command, to its end."""
        done = subprocess.run(
            [*COMMAND, *arguments], env=self.environment | environment, input=stdin if stdin is not None else b"",
            capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def ok(self, *arguments: str, stdin: bytes | None = None) -> str:
        """One `shoal` command that must succeed; what it printed."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def spawn(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """One `shoal` command, in the background."""
        return subprocess.Popen([*COMMAND, *arguments], env=self.environment, **options)

    def __enter__(self) -> Shoal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        if left := json.loads(self.run("ps", "--all", "--json").stdout or "[]"):
            self.run("rm", "--force", *(container["id"] for container in left))
        if self.stop() != 0:
            raise AssertionError(self.log.read_text()[-6000:])
