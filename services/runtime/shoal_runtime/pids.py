"""The processes of a container: those of its first process's cgroup, and below (cgroups(7), cgroup.procs)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_PREFERRED = ("pids", "memory", "devices", "name=systemd", "")


def of_container(pid: int) -> list[int]:
    """The pids, as this node numbers them, of the container whose first process is `pid`; none if it is gone."""
    directory = _cgroup(pid)
    found: set[int] = set()
    if directory is not None:
        for path, _, files in os.walk(directory):
            if "cgroup.procs" in files:
                with suppress(OSError):  # removed meanwhile
                    found.update(int(one) for one in Path(path, "cgroup.procs").read_text(encoding="ascii").split())
    elif Path(f"/proc/{pid}").exists():
        found.add(pid)
    return sorted(found)


def _cgroup(pid: int) -> Path | None:
    """A cgroup of the process that isn't a hierarchy's root, of which every process is."""
    paths: dict[str, str] = {}
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    points: dict[str, str] = {}
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup":
            points |= {option: point for option in options.split(",") if option in paths}
        elif kind == "cgroup2":
            points[""] = point
    for controller in _PREFERRED:
        path = paths.get(controller, "/")
        if path != "/" and controller in points:
            return Path(points[controller] + path)
    return None
