"""Takes down the container of a shim that is dead: kills it, and undoes what the shim had made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import structlog

from shoal_runtime.shim import mounts, protocol

log = structlog.get_logger(__name__)

KILLED = 137
_RUNTIME_SECONDS = 20.0
_DELETIONS = 5
_DYING_SECONDS = 5.0
_HELLO_SECONDS = 5.0


def is_alive(place: str) -> bool:
    """Whether a shim is there: one that is just dying still takes connections, and says nothing any more. Blocks."""
    try:
        with closing(protocol.connect(place, protocol.SOCKET)) as connection:
            connection.settimeout(_HELLO_SECONDS)
            return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def remove_container(place: str, record: dict[str, Any], exit: dict[str, Any] | None) -> dict[str, Any]:
    """How the container in shim directory `place` ended (137 where nothing says so), after all of it is gone.

    Blocks for as long as the OCI runtime takes: it belongs on a thread.
    """
    _kill_session(int(record["pid"]))
    mounts.unmount_all(str(_kept(record)))  # runc mounts itself there for a moment
    init = protocol.read_json(place, protocol.INIT) or {"pid": 0, "started": ""}
    _thaw(record["bundle"])
    if not _delete(record):
        log.error("takedown.runtime", container=record["id"], runtime=record["runtime"])
    if init["pid"]:
        _kill_for_sure(int(init["pid"]), init["started"])
    remove_cgroups(record["bundle"])
    shutil.rmtree(_kept(record), ignore_errors=True)  # what was half made, or half removed, is nothing it knows
    mounts.unmount_all(str(Path(record["bundle"], "rootfs")))
    ended = exit or {"pid": init["pid"], "exit_status": KILLED, "exited_at": time.time()}
    return ended | {"taken_down": True}


def _kept(record: dict[str, Any]) -> Path:
    """Where runc, and crun, keep what they know of a container."""
    return Path(record["runtime_root"], record["id"])


def _delete(record: dict[str, Any]) -> bool:
    """Has the OCI runtime remove a container, and says whether that is so; one that is killed midway is asked again."""
    arguments = [record["runtime"], "--root", record["runtime_root"], "delete", "--force", record["id"]]
    bundle = record["bundle"] if Path(record["bundle"]).is_dir() else "/"
    for _ in range(_DELETIONS):
        try:
            done = subprocess.run(
                arguments, cwd=bundle, capture_output=True, text=True, timeout=_RUNTIME_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("takedown.failed", container=record["id"], error=str(error))
            return False
        if done.returncode == 0 or "does not exist" in done.stderr or not _kept(record).exists():
            return True
        log.warning(
            "takedown.failed",
            container=record["id"],
            status=done.returncode,
            error=" ".join(done.stderr.split())[-300:],
        )
        if done.returncode > 0:
            return False
    return False


def _kill_session(shim: int) -> None:
    """Kills what the shim had started and is still at work: it would make anew what is removed now.

    The shim leads a session. OCI runtimes and their hooks are in it, and nothing that outlives it: containers lead
    sessions of their own, and so do log programs. The session's number isn't given away while it has members.
    """

    def members() -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError, IndexError):
                    fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                    if int(fields[3]) == shim and fields[0] not in (b"Z", b"X"):
                        yield int(entry.name)

    def kill_all() -> bool:
        left = list(members())
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    _until(kill_all)


def _kill_for_sure(pid: int, started: str) -> None:
    """Ends the first process if it is still there, and is still the same one."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return

    def killed() -> bool:
        if not started or protocol.start_time(pid) != started:
            return True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        return False

    try:
        _until(killed)
    finally:
        os.close(fd)


def _cgroups(bundle: str) -> Iterator[Path]:
    """Where a container's cgroups would be, in every hierarchy."""
    spec = protocol.read_json(bundle, "config.json") or {}
    path = str((spec.get("linux") or {}).get("cgroupsPath") or "").strip("/")
    if not path or ":" in path or ".." in path.split("/"):
        return
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind = line.split()[:3]
        if kind in ("cgroup", "cgroup2"):
            yield Path(point, path)


def _thaw(bundle: str) -> None:
    """Thaws a container, or it wouldn't die, in either kind of cgroup (freezer-subsystem.rst, cgroup-v2.rst)."""
    for directory in _cgroups(bundle):
        for name, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            with suppress(OSError):
                (directory / name).write_text(thawed, encoding="ascii")


def _kill_half_made(cgroup: Path) -> None:
    """Kills the processes of a cgroup that are in some container, and no shim's: theirs is dead."""
    own = Path("/proc/self/ns/pid").readlink()
    with suppress(OSError):
        for pid in map(int, (cgroup / "cgroup.procs").read_text(encoding="ascii").split()):
            with suppress(OSError):
                if Path(f"/proc/{pid}/ns/pid").readlink() != own and not _has_shim(pid):
                    os.kill(pid, signal.SIGKILL)


def _has_shim(pid: int) -> bool:
    """Whether a living shim is an ancestor of a process."""
    while pid > 1:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
        if head.endswith("(shoal-shim"):
            return True
        pid = int(tail.split()[1])
    return False


def remove_cgroups(bundle: str) -> None:
    """Removes the cgroups that a container left which its runtime knows nothing of: it was killed, and had just begun.

    What it had begun is killed. Where others are in them, the cgroups stay: they are somebody else's, too. Blocks.
    """
    left = list(_cgroups(bundle))

    def removed() -> bool:
        for directory in list(left):
            try:
                directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                _kill_half_made(directory)
                continue  # they are in it, for now
            left.remove(directory)
        return not left

    _until(removed)


def _until(done: Callable[[], bool]) -> bool:
    """Tries until it is done, for as long as processes may take to die."""
    ends = time.monotonic() + _DYING_SECONDS
    while not done():
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True
