"""`shoal top`: the processes of a container, as this machine's /proc describes them (proc(5))."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

from shoal_cli.target import Target

Described = dict[str, Any]
"""A process: `user`, `uid`, `cpu_seconds` and `command`."""


def is_here(target: Target) -> bool:
    """Whether the node meant is the one that is up on this machine: then its pids are those of our /proc."""
    if target.nats_url:
        return False
    from shoal_bus.node import find

    return target.find().name == find(state=target.state).name


def describe(pid: int) -> Described | None:
    """What /proc says of a process, or None when it has gone. Its user has the name that this machine gives it."""
    place = Path("/proc", str(pid))
    try:
        stat = (place / "stat").read_text(errors="replace")
        status = (place / "status").read_text(errors="replace")
        arguments = (place / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, fields = stat.partition("(")[2].rpartition(")")[0], stat.rpartition(")")[2].split()
    uid = next(int(line.split()[2]) for line in status.splitlines() if line.startswith("Uid:"))  # the effective one
    command = arguments.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace") or f"[{name}]"
    return {
        "user": _user(uid),
        "uid": uid,
        "cpu_seconds": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        # A container says what its command lines are: they mustn't reach a terminal's controls.
        "command": "".join(c if c.isprintable() else "?" for c in command),
    }


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def cpu_time(seconds: float) -> str:
    """As ps(1) has it: `00:00:07`, and with days in front `2-03:00:00`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"
