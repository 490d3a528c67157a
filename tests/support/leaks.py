"""What a test may leave behind: nothing. Mounts, network namespaces, links, cgroups and shims, before and after."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SETTLE_SECONDS = 10.0
_ROOT = Path("/sys/fs/cgroup")


def mounts() -> set[str]:
    """Mount points of this mount namespace."""
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def network_namespaces() -> set[str]:
    """Named network namespaces of shoal's."""
    directory = Path("/run/netns")
    return {entry.name for entry in directory.iterdir() if "shoal" in entry.name} if directory.is_dir() else set()


def links() -> set[str]:
    """Network interfaces of this network namespace."""
    return {link.name for link in Path("/sys/class/net").iterdir()}


BESIDE = "theirs"
"""What the namespaces of a containerd begin with that a test runs beside shoal, and whose cgroups that test removes."""


def empty_cgroups() -> set[str]:
    """Cgroups of every hierarchy, by path, in which and below which no process is.

    One that has processes is somebody's container at work, perhaps of a test beside this one; what a container leaves
    behind has none. (A process that is left is found by its mounts, or by its shim.)
    """
    found: set[str] = set()
    populated: set[str] = set()
    for directory, _, files in os.walk(_ROOT, topdown=False):
        if "cgroup.procs" not in files or f"/{BESIDE}" in directory:
            continue
        try:
            has_processes = bool(Path(directory, "cgroup.procs").read_bytes())
        except OSError:
            continue  # removed meanwhile
        if has_processes or directory in populated:
            populated.add(str(Path(directory).parent))
        else:
            found.add(directory)
    return found


def cgroups_of(pattern: str) -> list[Path]:
    """Where the cgroups are whose path is like `pattern`: one place with cgroup v2, one for each hierarchy with v1."""
    return [path for path in (*_ROOT.glob(pattern), *_ROOT.glob(f"*/{pattern}")) if path.is_dir()]


def remove_cgroups(name: str) -> None:
    """Removes the cgroups of that name at the top of each hierarchy, with what is below, where nothing runs in them."""
    for top in [_ROOT / name, *_ROOT.glob(f"*/{name}")]:
        for directory, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                Path(directory).rmdir()


def lives(pid: int) -> bool:
    """Whether a process is there and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes(directory: str) -> list[str]:
    """Zygotes and shims that belong to a state directory below `directory`."""
    return [line for line in _zygotes() if directory in line]


def _zygotes() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if "shoal-zygote" in command:
                found.append(f"{entry.name} {command.strip()}")
    return found


@dataclass
class Leaks:
    """A count taken before; `check` compares it with what is there now, once things have had time to settle."""

    directory: str
    before_mounts: set[str] = field(default_factory=mounts)
    before_namespaces: set[str] = field(default_factory=network_namespaces)
    before_links: set[str] = field(default_factory=links)
    before_cgroups: set[str] = field(default_factory=empty_cgroups)

    def found(self) -> list[str]:
        left = [f"mount {path}" for path in mounts() - self.before_mounts if path.startswith(self.directory)]
        left += [f"netns {name}" for name in network_namespaces() - self.before_namespaces]
        left += [f"link {name}" for name in links() - self.before_links]
        left += [f"cgroup {path}" for path in empty_cgroups() - self.before_cgroups if not self._shared(path)]
        left += [f"process {line}" for line in processes(self.directory)]
        return left

    def _shared(self, cgroup: str) -> bool:
        """Whether it is the default namespace's, of which another test's node has had a container: it goes with it."""
        others = any(self.directory not in line for line in _zygotes())
        return others and Path(cgroup).name == "default" and len(Path(cgroup).parts) <= len(_ROOT.parts) + 2

    def check(self) -> None:
        """AssertionError naming what is left, if anything still is after a few seconds, and was all the while.

        What comes and goes meanwhile is of a test beside this one.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        left = set(self.found())
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left &= set(self.found())
        assert not left, "left behind:\n  " + "\n  ".join(sorted(left))
