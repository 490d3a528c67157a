"""Debian's dockerd, with everything it makes below a directory of its own; it runs no containers and has no network.

with Dockerd(directory) as docker:
    docker("load", "-i", str(archive))
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_START_SECONDS = 60
_PRIVATELY = 'mount -t tmpfs none /etc/docker; mount -t tmpfs none /run; exec "$0" "$@"'


class Dockerd:
    """A running dockerd, spoken to by calling it with a docker command's arguments.

    It starts in a mount namespace of its own, so that its mounts end with it, and what it writes to /etc/docker and
    /run, which can't be told otherwise, is nobody else's. It brings its own containerd.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._socket = directory / "d.sock"
        self._log = directory / "dockerd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, *arguments: str, stdin: bytes | None = None) -> str:
        """What a docker command prints; it must succeed."""
        done = self._run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"docker {arguments}: {done.stderr.decode()}\n{self._log.read_text()[-2000:]}"
        return done.stdout.decode()

    def _run(self, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        command = ["docker", "--config", str(self.directory / "config"), "-H", f"unix://{self._socket}", *arguments]
        return subprocess.run(command, input=stdin or b"", capture_output=True, timeout=60, check=False)

    def __enter__(self) -> Self:
        binary = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert binary, "dockerd isn't installed: apt-get install docker.io"
        (self.directory / "empty.json").write_text("{}")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "unshare", "--mount", "--propagation", "private", "sh", "-ec", _PRIVATELY, binary, "--host", f"unix://{self._socket}",
                    "--config-file", str(self.directory / "empty.json"), "--data-root", str(self.directory / "data"),
                    "--exec-root", str(self.directory / "x"), "--pidfile", str(self.directory / "pid"),
                    "--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-forward=false",
                    "--ip-masq=false", "--userland-proxy=false",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while self._run("version").returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._stop()
                raise AssertionError(f"dockerd didn't start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()  # it ends its containerd, too
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
