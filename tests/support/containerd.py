"""A containerd of a test's own, for what is exchanged with it: its root and socket in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_START_SECONDS = 30.0
_RUNC = Path("/run/containerd/runc")
"""Where it has runc keep its state, a directory for each namespace, whatever its own is."""
_CONFIG = """\
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{directory}/sock"
"""


class Containerd:
    """One that runs."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "sock"

    def ctr(self, *arguments: str) -> str:
        """What `ctr` prints; it must succeed."""
        command = ["ctr", "--address", str(self.socket), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def answers(self) -> bool:
        """Whether it does yet."""
        command = ["ctr", "--address", str(self.socket), "version"]
        return self.socket.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def running() -> Iterator[Containerd]:
    """containerd for the length of a block."""
    directory = Path(tempfile.mkdtemp(prefix="shoal-containerd-", dir="/tmp"))  # a socket's path is short
    (directory / "tmp").mkdir()
    before = set(_RUNC.glob("*"))
    (directory / "config.toml").write_text(_CONFIG.format(directory=directory))
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            ["containerd", "--config", str(directory / "config.toml")],
            stdout=log, stderr=log, start_new_session=True, env={**os.environ, "TMPDIR": str(directory / "tmp")},
        )  # fmt: skip
    try:
        made = Containerd(directory)
        deadline = time.monotonic() + _START_SECONDS
        while not made.answers():
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.05)
        yield made
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory)
        for left in set(_RUNC.glob("*")) - before:
            with suppress(OSError):  # somebody else's, in use
                left.rmdir()
