"""Whoever called a command, as a process: what a fork of the node's process takes over to be in its place."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from shoal_cli.commandserver.client import PASSED_ON

_NAMESPACES = ("mnt", "net", "user", "pid", "pid_for_children", "uts", "ipc", "cgroup", "time")
_SAME = ("Uid", "Gid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "SigBlk")
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


class Different(Exception):
    """A fork of this process can't be what the caller is; it says in what."""


def become(pid: int) -> None:
    """Makes this process what process `pid` is: groups, limits, priorities, mask, signals, cgroups. Different if not.

    What can't be taken over must be the same: namespaces, root directory, user, capabilities, security label.
    """
    try:
        _become(pid, _status(pid))
    except (OSError, ValueError) as error:
        raise Different(str(error)) from error


def _become(pid: int, theirs: dict[str, str]) -> None:
    _must_be_the_same(pid, theirs)
    os.setgroups([int(group) for group in theirs["Groups"].split()])
    os.umask(int(theirs["Umask"], 8))
    os.sched_setaffinity(0, os.sched_getaffinity(pid))
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, pid))
    for limit in _LIMITS:
        resource.setrlimit(limit, resource.prlimit(pid, limit))
    likely = _read(pid, "oom_score_adj")
    if likely != _read("self", "oom_score_adj"):
        Path("/proc/self/oom_score_adj").write_text(likely, encoding="ascii")
    ignored = int(theirs["SigIgn"], 16)
    for number in (*PASSED_ON, signal.SIGPIPE, signal.SIGTSTP):
        if ignored >> (number - 1) & 1 or number == signal.SIGPIPE:  # as Python has it
            signal.signal(number, signal.SIG_IGN)
        elif number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        else:
            signal.signal(number, signal.SIG_DFL)
    _join_cgroups(pid)


def _must_be_the_same(pid: int, theirs: dict[str, str]) -> None:
    ours = _status("self")
    for name in _SAME:
        if theirs.get(name) != ours.get(name):
            raise Different(name)
    for namespace in _NAMESPACES:
        if _link(pid, f"ns/{namespace}") != _link("self", f"ns/{namespace}"):
            raise Different(f"{namespace} namespace")
    if not Path(f"/proc/{pid}/root").samefile("/proc/self/root"):
        raise Different("root directory")
    if _or_nothing(lambda: _read(pid, "attr/current")) != _or_nothing(lambda: _read("self", "attr/current")):
        raise Different("security label")


def _join_cgroups(pid: int) -> None:
    """What the command uses is counted where its caller's is, and ends with it: not with the node's unit."""
    theirs, ours = _cgroups(pid), _cgroups("self")
    for controllers, path in theirs.items():
        if path == ours.get(controllers):
            continue
        point = _mount_point(controllers)
        if point is not None:
            (point / path.lstrip("/") / "cgroup.procs").write_text("0", encoding="ascii")


def _mount_point(controllers: str) -> Path | None:
    """Where a hierarchy of /proc/<pid>/cgroup is mounted; None where it isn't."""
    wanted = set(controllers.split(",")) - {""}
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, kind, options = line.split()[:4]
        if (kind == "cgroup" and wanted and wanted <= set(options.split(","))) or (kind == "cgroup2" and not wanted):
            return Path(point)
    return None


def _cgroups(pid: int | str) -> dict[str, str]:
    lines = (line.split(":", 2) for line in _read(pid, "cgroup").splitlines())
    return {controllers: path for _, controllers, path in lines}


def _status(pid: int | str) -> dict[str, str]:
    """/proc/<pid>/status, of which the capabilities, the mask and the signals are hexadecimal or octal as there."""
    lines = (line.partition(":") for line in _read(pid, "status").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _read(pid: int | str, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="surrogateescape")


def _link(pid: int | str, name: str) -> str | None:
    return _or_nothing(lambda: str(Path(f"/proc/{pid}/{name}").readlink()))


def _or_nothing(read: Callable[[], str]) -> str | None:
    """None where this kernel doesn't have it."""
    try:
        return read()
    except OSError:
        return None
