"""The cgroup that a configuration names for the node's processes: cgroups(7), v1's hierarchies, v2's, or both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_bus.errors import FailedPrecondition

_ZYGOTE = "shoal-zygote"
_ZYGOTE_SECONDS = 2.0
"""How long one that nobody wants any more may take to end; it looks twice a second."""
_SELF = "0"


@contextmanager
def inside(path: str) -> Iterator[None]:
    """This process, and what it starts, is in cgroup `path` of every hierarchy for a block; "" is where it is anyway.

    What was made for that goes at the end, unless something is still in it: shims, whose containers run on.
    FAILED_PRECONDITION where it can't be had.
    """
    if not path:
        yield
        return
    before, made = _own(), list[Path]()
    try:
        for point, _ in _hierarchies():
            made += _enter(point, path)
        yield
    finally:
        for directory in before:
            with suppress(OSError):
                _move(directory)
        _remove(made)


def _enter(point: Path, path: str) -> list[Path]:
    """Moves this process there; what it had to make, the deepest last."""
    made, directory = list[Path](), point
    try:
        for name in path.split("/"):
            above, directory = directory, directory / name
            with suppress(FileExistsError):
                directory.mkdir()
                made.append(directory)
            _inherit_cpuset(above, directory)
        _move(directory)
    except OSError as error:
        _remove(made)
        raise FailedPrecondition(f"cgroup.path: {directory}: {error.strerror}") from None
    return made


def _inherit_cpuset(above: Path, directory: Path) -> None:
    """A new cpuset of v1 is empty, and takes no process until it has processors and memory."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        file = directory / name
        if (directory / "cpuset.cpu_exclusive").exists() and not file.read_text(encoding="ascii").strip():
            file.write_text((above / name).read_text(encoding="ascii"), encoding="ascii")


def _move(directory: Path) -> None:
    (directory / "cgroup.procs").write_text(_SELF, encoding="ascii")


def _remove(made: list[Path]) -> None:
    """Removes them where they are empty, or soon will be: the zygote leaves a moment after the node."""
    ends = time.monotonic() + _ZYGOTE_SECONDS
    for directory in reversed(made):
        while True:
            try:
                directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                if time.monotonic() < ends and _all_leave(directory):
                    time.sleep(0.05)
                    continue
            break


def _all_leave(directory: Path) -> bool:
    """Whether all that is in a cgroup is what goes by itself."""
    with suppress(OSError):
        pids = (directory / "cgroup.procs").read_text(encoding="ascii").split()
        return all(_name(pid) in ("", _ZYGOTE) for pid in pids) and not any(one.is_dir() for one in directory.iterdir())
    return False


def _name(pid: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    return ""


def _own() -> list[Path]:
    """The cgroups that this process is in."""
    found = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        names = [name for name in controllers.split(",") if name]
        for point, options in _hierarchies():
            if (options is None) == (not names) and all(name in (options or ()) for name in names):
                found.append(point / path.strip("/"))
    return found


def _hierarchies() -> list[tuple[Path, list[str] | None]]:
    """Where they are mounted, each once, with v1's options."""
    found: dict[tuple[str, ...] | None, Path] = {}
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup":
            found.setdefault(tuple(options.split(",")), Path(point))
        elif kind == "cgroup2":
            found.setdefault(None, Path(point))
    return [(point, None if options is None else [*options]) for options, point in found.items()]
