"""What could be left behind outside our own directory: processes, mounts, network namespaces, links, cgroups."""

from __future__ import annotations

import os
import time
from pathlib import Path

_SETTLE_SECONDS = 15.0


class World:
    """What there is before; `left` says what of ours there is besides, once things have had time to end.

    Ours is what carries one of `marks` in its name, path or command line. So others may use the machine meanwhile.
    """

    def __init__(self, *marks: str) -> None:
        self._marks = marks
        self._before = _everything()

    def left(self) -> list[str]:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (found := self._ours()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _ours(self) -> list[str]:
        new = _everything() - self._before
        return sorted(thing for thing in new if any(mark in thing for mark in self._marks))


def _everything() -> set[str]:
    return {*_processes(), *_mounts(), *_network(), *_cgroups()}


def _processes() -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            # A supervisor's command line says little; what it has open or works in says whose it is.
            places = {str(fd.readlink()) for fd in (entry / "fd").iterdir() if fd.is_symlink()}
        except OSError:
            continue
        command = " ".join(word.decode(errors="replace") for word in words).strip()
        found.add(f"process {entry.name} {command} [{' '.join(sorted(places))}]")
    return found


def _mounts() -> set[str]:
    return {f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def _network() -> set[str]:
    namespaces = Path("/run/netns")
    names = {f"netns {path.name}" for path in namespaces.iterdir()} if namespaces.is_dir() else set()
    return names | {f"link {link.name}" for link in Path("/sys/class/net").iterdir()}


def _cgroups() -> set[str]:
    return {f"cgroup {directory}" for directory, _, _ in os.walk("/sys/fs/cgroup")}
