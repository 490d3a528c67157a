"""Debian's ctr against two sockets: the gateway's and that of Debian's containerd, and what it prints compared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import bundle, containerd
from tests.support.gateway import ctr, lines_of
from tests.support.gateway_tasks import GatewayNode
from tests.support.leaks import BESIDE, remove_cgroups


@dataclass(frozen=True)
class Side:
    """A socket, a namespace and a root file system of its own."""

    socket: Path
    namespace: str
    rootfs: Path

    def ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        filled = [one.replace("ROOTFS", str(self.rootfs)) for one in arguments]
        return ctr(self.socket, "--namespace", self.namespace, *filled)

    def ok(self, *arguments: str) -> str:
        done = self.ctr(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def run(self, *arguments: str, flags: Sequence[str] = ("--rm",)) -> str:
        return self.ok("run", *flags, "--rootfs", "ROOTFS", *arguments)

    def detached(self, id: str, *arguments: str, flags: Sequence[str] = ()) -> None:
        self.run(id, *(arguments or ("/bin/sleep", "600")), flags=("--detach", "--null-io", *flags))

    def end(self, id: str) -> None:
        """Kills a task and removes it with its container."""
        self.ctr("tasks", "kill", "--signal", "KILL", id)
        deadline = time.monotonic() + 20
        while " STOPPED" not in "".join(lines_of(self.ok("tasks", "ls"), id)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.ctr("tasks", "rm", id)
        self.ok("containers", "rm", id)

    def pid(self, id: str) -> int:
        return int(lines_of(self.ok("tasks", "ls"), f"{id} ")[0].split()[1])


def ours_of(node: GatewayNode) -> Side:
    """The gateway's side, in the node's own namespace."""
    return Side(node.socket, node.namespace, node.rootfs)


@contextmanager
def running_theirs(directories: pytest.TempPathFactory) -> Iterator[Side]:
    """Containerd's side for a block, at whose end nothing of it runs."""
    rootfs = bundle.busybox_rootfs(directories.mktemp("theirs") / "rootfs")
    namespace = f"{BESIDE}{os.getpid()}"
    try:
        with containerd.running() as daemon:
            side = Side(daemon.socket, namespace, rootfs)
            try:
                yield side
            finally:
                for id in side.ok("tasks", "ls", "-q").split():
                    side.ctr("tasks", "kill", "--signal", "KILL", id)
                    time.sleep(0.2)
                    side.ctr("tasks", "rm", "--force", id)
    finally:  # what it leaves of a namespace
        remove_cgroups(namespace)
        shutil.rmtree(Path("/run/containerd/runc") / namespace, ignore_errors=True)


def same(ours: Side, theirs: Side, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on both sides: its output, but for numbers of processes, and its status are one."""
    expected, found = theirs.ctr(*command), ours.ctr(*command)

    def shown(done: subprocess.CompletedProcess[str]) -> str:
        # A process's number is as wide as it is: so are the columns.
        return re.sub(r"[ \t]+", " ", re.sub(r"\b\d{2,7} ", "PID ", done.stdout))

    assert shown(found) == shown(expected), (command, found.stdout, expected.stdout, found.stderr, expected.stderr)
    assert found.returncode == expected.returncode, (command, found.stderr, expected.stderr)
    assert bool(found.stderr) == bool(expected.stderr), (command, found.stderr, expected.stderr)
    for word in ("already exists", "not found", "executable file not found in $PATH", "OCI runtime", "must be stopped"):
        assert (word in found.stderr) == (word in expected.stderr), (command, found.stderr, expected.stderr)
    return found
