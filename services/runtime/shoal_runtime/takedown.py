"""Takes down the container of a shim that is dead: kills it, and undoes what the shim had made."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from shoal_runtime.shim import mounts, protocol

log = structlog.get_logger(__name__)

KILLED = 137
_RUNTIME_SECONDS = 20.0
_DYING_SECONDS = 5.0


def remove_container(place: str, record: dict[str, Any], exit: dict[str, Any] | None) -> dict[str, Any]:
    """How the container in shim directory `place` ended (137 where nothing says so), after all of it is gone.

    Blocks for as long as the OCI runtime takes: it belongs on a thread.
    """
    _kill_half_done(int(record["pid"]), record["runtime"])
    init = protocol.read_json(place, protocol.INIT) or {"pid": 0, "started": ""}
    arguments = [record["runtime"], "--root", record["runtime_root"], "delete", "--force", record["id"]]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=_RUNTIME_SECONDS, check=False)
    if result.returncode != 0:
        if "does not exist" not in result.stderr:
            log.error("takedown.runtime", container=record["id"], error=" ".join(result.stderr.split())[-300:])
        _remove_cgroups(record["bundle"])
    if init["pid"]:
        _kill_for_sure(int(init["pid"]), init["started"])
    mounts.unmount_all(str(Path(record["bundle"], "rootfs")))
    ended = exit or {"pid": init["pid"], "exit_status": KILLED, "exited_at": time.time()}
    return ended | {"taken_down": True}


def _kill_half_done(shim: int, runtime: str) -> None:
    """A runtime that the shim had started and that still works would make anew what is removed now.

    The shim leads a session, and what it starts is in it; a session's number isn't given away while it has members.
    """
    name = Path(runtime).name
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, IndexError, ValueError):
            session = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[3])
            if session == shim and name in str((entry / "exe").readlink()):
                os.kill(int(entry.name), signal.SIGKILL)


def _kill_for_sure(pid: int, started: str) -> None:
    """Ends the first process if it is still there, and is still the same one."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ends = time.monotonic() + _DYING_SECONDS
        while started and protocol.start_time(pid) == started and time.monotonic() < ends:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            time.sleep(0.01)
    finally:
        os.close(fd)


def _remove_cgroups(bundle: str) -> None:
    """The cgroups of a container that the runtime knows nothing of (yet): they are empty now, and removed."""
    spec = protocol.read_json(bundle, "config.json") or {}
    path = str((spec.get("linux") or {}).get("cgroupsPath") or "").strip("/")
    if not path or ":" in path or ".." in path.split("/"):
        return
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind = line.split()[:3]
        if kind in ("cgroup", "cgroup2"):
            with suppress(OSError):  # not there, or (somebody else's) not empty
                Path(point, path).rmdir()
