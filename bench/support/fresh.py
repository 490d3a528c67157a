"""Either side on a file system of its own, made for one run: what earlier runs created and deleted slows nobody down.

Creating files where many have just been deleted makes ext4 scan the deleted inodes, which takes longer than what is
measured. So each run gets a new ext4, a daemon that has done nothing yet, and empty caches.
"""

from __future__ import annotations

import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import psutil

from bench.support import containerd, shoal
from bench.support.scratch import Scratch

_RUNS = count()


class Fresh(ABC):
    """A daemon that has just been started, as its command line has it."""

    name: str
    root: Path

    @abstractmethod
    def pull_command(self, reference: str) -> list[str]:
        """The command that pulls and unpacks an image from a registry without TLS."""

    @abstractmethod
    def push_commands(self, reference: str, to: str) -> tuple[list[str], list[str]]:
        """What has to be done first, if anything, and the command that pushes an image under another name."""

    @abstractmethod
    def export_command(self, reference: str, archive: Path) -> list[str]: ...

    @abstractmethod
    def import_command(self, archive: Path) -> list[str]:
        """The command that imports and unpacks an archive."""

    @abstractmethod
    def version_command(self) -> list[str]: ...

    @property
    @abstractmethod
    def environment(self) -> dict[str, str]: ...

    @property
    @abstractmethod
    def snapshots(self) -> Path:
        """The directory that holds the snapshots' own."""

    @abstractmethod
    def storing(self) -> list[int]:
        """The processes that pull and unpack, as of now."""

    def command(self, command: Sequence[str]) -> float:
        """Seconds that a command takes, a process from its start to its end."""
        begun = time.perf_counter()
        done = subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            cwd=os.sep,
        )  # fmt: skip
        took = time.perf_counter() - begun
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exited with {done.returncode}: {done.stderr.strip()}")
        return took

    def forget_caches(self) -> None:
        """Empties the page cache; only the command line itself, which is no part of what is compared, is warm again."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        self.command(self.version_command())

    def files(self) -> int:
        """How many files the snapshots hold: whoever says that it is done must have unpacked them all."""
        return sum(len(files) for _, _, files in os.walk(self.snapshots))


class FreshContainerd(Fresh):
    name = "containerd"

    def __init__(self, daemon: containerd.Daemon) -> None:
        self.daemon, self.root = daemon, daemon.root

    def _ctr(self, *arguments: str) -> list[str]:
        return ["ctr", "--address", str(self.daemon.address), *arguments]

    def pull_command(self, reference: str) -> list[str]:
        return self._ctr("images", "pull", "--plain-http", reference)

    def push_commands(self, reference: str, to: str) -> tuple[list[str], list[str]]:
        return [], self._ctr("images", "push", "--plain-http", to, reference)

    def export_command(self, reference: str, archive: Path) -> list[str]:
        return self._ctr("images", "export", str(archive), reference)

    def import_command(self, archive: Path) -> list[str]:
        return self._ctr("images", "import", str(archive))

    def version_command(self) -> list[str]:
        return self._ctr("version")

    @property
    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    @property
    def snapshots(self) -> Path:
        return self.root / "io.containerd.snapshotter.v1.overlayfs" / "snapshots"

    def storing(self) -> list[int]:
        return [self.daemon.pid]


class FreshShoal(Fresh):
    name = "shoal"

    def __init__(self, node: shoal.Node) -> None:
        self.node, self.root = node, node.root
        self._shoal = shoal.installed()
        children = psutil.Process(node.pid).children()
        self._services = [one for one in children if one.name() in ("shoal-content", "shoal-snapshot")]

    def pull_command(self, reference: str) -> list[str]:
        return [*self._shoal, "pull", reference]

    def push_commands(self, reference: str, to: str) -> tuple[list[str], list[str]]:
        return [*self._shoal, "tag", reference, to], [*self._shoal, "push", to]

    def export_command(self, reference: str, archive: Path) -> list[str]:
        return [*self._shoal, "save", "--output", str(archive), reference]

    def import_command(self, archive: Path) -> list[str]:
        return [*self._shoal, "load", "--input", str(archive)]

    def version_command(self) -> list[str]:
        return [*self._shoal, "nodes"]

    @property
    def environment(self) -> dict[str, str]:
        return self.node.environment

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshot" / "overlayfs"

    def storing(self) -> list[int]:
        """The content and the snapshot service, with the workers that the latter forks."""
        workers = [one for service in self._services for one in service.children(recursive=True)]
        return [one.pid for one in [*self._services, *workers]]


@contextmanager
def fresh_containerd(scratch: Scratch) -> Iterator[FreshContainerd]:
    """containerd on a new file system, until the block is left."""
    with ExitStack() as stack:
        run = f"c{next(_RUNS)}"
        disk = scratch.disk(run, stack)
        yield FreshContainerd(stack.enter_context(containerd.running(disk / "root", scratch.directory / f"{run}-run")))


@contextmanager
def fresh_shoal(scratch: Scratch) -> Iterator[FreshShoal]:
    """shoal on a new file system, until the block is left."""
    with ExitStack() as stack:
        run = f"s{next(_RUNS)}"
        disk = scratch.disk(run, stack)
        yield FreshShoal(stack.enter_context(shoal.running(disk / "root", scratch.directory / f"{run}-run")))


SIDES = (fresh_containerd, fresh_shoal)
