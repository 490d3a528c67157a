"""A world of a benchmark's own: fresh file systems, and everything undone at the end.

Both sides' persistent files lie on an ext4 of their own, made for this run, on a loop device over a file in /dev/shm;
what doesn't outlive a reboot lies in /dev/shm itself, as it would in /run. So neither waits for this machine's disk,
and neither pays for what the other, or a run before, left in its journal.

Everything of a run carries its mark: in paths, in command lines, as a cgroup. What its owner didn't undo, because it
was interrupted or failed, is found by that mark.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_SHIM_SOCKETS = Path("/run/containerd/s")
"""Where containerd's shims have their sockets, whatever its configuration says."""
_DISK_BYTES = 8 << 30
_SETTLE_SECONDS = 10.0


@dataclass(frozen=True)
class Scratch:
    """`mark` is unique and stands in `directory`'s name; it also is the parent of every container's cgroup."""

    mark: str
    directory: Path

    def disk(self, name: str, stack: ExitStack) -> Path:
        """A fresh ext4, mounted until the stack is left; then its memory is given back."""
        image, place = self.directory / f"{name}.img", self.directory / name
        place.mkdir()
        stack.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            file.truncate(_DISK_BYTES)
        _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", str(image))
        _run("mount", "-o", "loop,noinit_itable", str(image), str(place))
        stack.callback(_unmount, str(place))
        return place


@contextmanager
def scratch() -> Iterator[Scratch]:
    """The world, until the block is left; then nothing of it is."""
    mark = f"shoal-bench-{secrets.token_hex(3)}"
    sockets = _shim_sockets()
    had_sockets = [path for path in (_SHIM_SOCKETS, _SHIM_SOCKETS.parent) if path.exists()]
    directory = Path("/dev/shm", mark)
    directory.mkdir(mode=0o711)
    world = Scratch(mark, directory)
    try:
        yield world
    finally:
        sweep(world)
        shutil.rmtree(directory, ignore_errors=True)
        for path in _shim_sockets() - sockets:
            if _is_dead(path):
                path.unlink(missing_ok=True)
        for path in (_SHIM_SOCKETS, _SHIM_SOCKETS.parent):
            if path not in had_sockets:
                with suppress(OSError):
                    path.rmdir()
    left = leftovers(world)
    if left:
        raise RuntimeError("left behind:\n  " + "\n  ".join(left))


def leftovers(world: Scratch) -> list[str]:
    """What there is of this run: processes, mounts, loop devices, cgroups, its directory."""
    found = [f"process {pid}" for pid in _processes(world)]
    found += [f"mount {place}" for place in _mounts(world)]
    found += [f"loop device {path.parent.parent.name}" for path in _loops(world)]
    found += [f"cgroup {path}" for path in _cgroups(world)]
    return found + ([str(world.directory)] if world.directory.exists() else [])


def sweep(world: Scratch) -> None:
    """Kills, unmounts and removes what is still there of this run."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        processes = _processes(world)
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for place in _mounts(world):
            _unmount(place)
        cgroups = _cgroups(world)
        for path in cgroups:
            with suppress(OSError):
                path.rmdir()
        if not processes and not _mounts(world) and not _cgroups(world):
            return
        time.sleep(0.05)


def _processes(world: Scratch) -> list[int]:
    found = {int(pid) for path in _cgroups(world) for pid in _read(path / "cgroup.procs").split()}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and str(world.directory) in _read(entry / "cmdline"):
            found.add(int(entry.name))
    return sorted(found - {os.getpid()})


def _mounts(world: Scratch) -> list[str]:
    """Mount points below our directory, deepest first."""
    places = [line.split()[4] for line in _read(Path("/proc/self/mountinfo")).splitlines()]
    return sorted((place for place in places if place.startswith(f"{world.directory}/")), reverse=True)


def _loops(world: Scratch) -> list[Path]:
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    return [path for path in files if str(world.directory) in _read(path)]


def _cgroups(world: Scratch) -> list[Path]:
    """Our cgroups in every hierarchy, deepest first."""
    tops = [*_CGROUPS.glob(world.mark), *_CGROUPS.glob(f"*/{world.mark}")]
    found = [Path(directory) for top in tops for directory, _, _ in os.walk(top)]
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def _shim_sockets() -> set[Path]:
    return set(_SHIM_SOCKETS.iterdir()) if _SHIM_SOCKETS.is_dir() else set()


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return True
    return False


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _unmount(place: str) -> None:
    if subprocess.run(["umount", place], check=False, capture_output=True).returncode != 0:
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
