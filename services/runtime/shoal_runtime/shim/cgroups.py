"""Which cgroup the zygote and the shims are in themselves: out of a service's unit, or where a client wants them."""

from __future__ import annotations

import os
import sys

from shoal_runtime.shim import files
from shoal_runtime.shim.protocol import ShimError


def leave_unit() -> None:
    """Out of the service's unit, where systemd keeps one: stopping or restarting it must not touch containers.

    Only the hierarchies that systemd itself uses say what belongs to a unit: its named one, and cgroup v2.
    """
    entries = [line.split(":", 2) for line in files.read("/proc/self/cgroup").decode().splitlines()]
    for _, controllers, path in entries:
        if controllers not in ("", "name=systemd") or not path.endswith((".service", ".scope")):
            continue
        kind = "cgroup" if controllers else "cgroup2"
        for point, found, options in _hierarchies():
            if found == kind and (not controllers or controllers in options):
                try:
                    os.makedirs(f"{point}/shoal", exist_ok=True)
                    _move(f"{point}/shoal", [os.getpid()])
                except OSError as error:
                    sys.stderr.write(f"zygote: stays in {path}: {error}\n")
                break


def join(path: str, pids: list[int]) -> None:
    """Moves processes to cgroup `path` of every hierarchy, made where it isn't there. FAILED_PRECONDITION if not."""
    if ".." in path.split("/"):
        raise ShimError("INVALID_ARGUMENT", f"shim cgroup {path}: must be a plain path")
    for point, _, options in _hierarchies():
        directory = f"{point}/{path.strip('/')}"
        try:
            os.makedirs(directory, exist_ok=True)
            if "cpuset" in options:
                _inherit_cpuset(point, path.strip("/"))
            _move(directory, pids)
        except OSError as error:
            leave(path, pids)
            raise ShimError("FAILED_PRECONDITION", f"shim cgroup {directory}: {error.strerror}") from None


def _inherit_cpuset(point: str, path: str) -> None:
    """A new cpuset of cgroup v1 is empty, and takes no process until it has its parent's processors and memory."""
    directory = point
    for name in path.split("/"):
        above, directory = directory, f"{directory}/{name}"
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not files.read(f"{directory}/{file}").strip():
                files.append(f"{directory}/{file}", files.read(f"{above}/{file}").decode())


def leave(path: str, pids: list[int]) -> None:
    """Moves processes to the root again and removes cgroup `path` where nobody else is in it."""
    for point, _, _ in _hierarchies():
        try:
            _move(point, pids)
            os.rmdir(f"{point}/{path.strip('/')}")
        except OSError:
            pass  # another shim is in it


def of(pid: int) -> list[tuple[str, list[str]]]:
    """The cgroups a process is in, those apart that we are in ourselves: their directories, each with its controllers.

    That of cgroup v2 has none here, whatever is enabled in it. A process that has ended is in none.
    """
    try:
        ours, theirs = _paths("self"), _paths(str(pid))
    except OSError:
        return []
    found = []
    for controllers, path in theirs.items():
        names = [name for name in controllers.split(",") if name]
        point = _point_of(names)
        if point and path not in ("/", ours.get(controllers)):
            found.append((point + path, names))
    return found


def of_this_process() -> list[str]:
    """The directories of the cgroups that this process is in."""
    found = []
    for controllers, path in _paths("self").items():
        point = _point_of([name for name in controllers.split(",") if name])
        if point and os.path.isdir(point + path):
            found.append(point + path)
    return found


def points() -> list[str]:
    """Where the hierarchies are mounted."""
    if not _known:
        prepare()
    return [point for point, _, _ in _known]


def remove(directory: str) -> bool:
    """Removes a cgroup without processes, with those below it; whether it is gone."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:  # there are some below it, or processes in it
        try:
            for name in os.listdir(directory):
                if os.path.isdir(f"{directory}/{name}"):
                    remove(f"{directory}/{name}")
            os.rmdir(directory)
        except OSError:
            return False
    return True


def _paths(pid: str) -> dict[str, str]:
    """By the controllers of each hierarchy, as one field, where in it a process is (cgroups(7), /proc/pid/cgroup)."""
    lines = files.read(f"/proc/{pid}/cgroup").decode().splitlines()
    return {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}


def _point_of(controllers: list[str]) -> str:
    """Where the hierarchy of these controllers is mounted, cgroup v2's for none; empty when it isn't."""
    for again in (False, True):
        if again or not _known:
            _known[:] = _hierarchies()
        for point, kind, options in _known:
            if (kind == "cgroup" and controllers and all(name in options for name in controllers)) or (
                kind == "cgroup2" and not controllers
            ):
                return point
    return ""


_known: list[tuple[str, str, list[str]]] = []
"""The hierarchies, as they were last looked up: the zygote does so once for all shims (`prepare`)."""


def prepare() -> None:
    """Looks up the hierarchies, for everybody who is forked from here on."""
    _known[:] = _hierarchies()


def _move(directory: str, pids: list[int]) -> None:
    for pid in pids:
        files.append(f"{directory}/cgroup.procs", str(pid))


def _hierarchies() -> list[tuple[str, str, list[str]]]:
    """Mount point, kind and options of every cgroup hierarchy."""
    found = []
    for line in files.read("/proc/self/mounts").decode().splitlines():
        _, point, kind, options = line.split()[:4]
        if kind in ("cgroup", "cgroup2"):
            found.append((point, kind, options.split(",")))
    return found
