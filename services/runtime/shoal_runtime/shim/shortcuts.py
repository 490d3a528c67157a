"""What runc and crun would be started for, done without: their start takes more time than most of what they do.

Both leave the created container's first process waiting at a FIFO in their directory, and there the cgroups that a
deletion removes are written down. Of any other runtime, and wherever something isn't as expected, nothing is done here.
"""

from __future__ import annotations

import os
import select

from shoal_runtime.shim import cgroups, codec, files
from shoal_runtime.shim.loop import Loop
from shoal_runtime.shim.oci import OciRuntime
from shoal_runtime.shim.process import Process
from shoal_runtime.shim.protocol import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Done = Callable[["ShimError | None"], None]

FIFO = "exec.fifo"


def start(loop: Loop, oci: OciRuntime, init: Process, done: Done) -> None:
    """Has a created container's first process `init` go on, by its FIFO or by the runtime's command."""
    if oci.kind == "runc":
        _read(loop, oci, init, done)
    elif oci.kind != "crun" or not _write(f"{oci.place}/{FIFO}"):
        oci.start(done)
    else:
        done(None)


def _read(loop: Loop, oci: OciRuntime, init: Process, done: Done) -> None:
    """runc's container starts when somebody reads what it writes, and that removes the FIFO."""
    fifo = f"{oci.place}/{FIFO}"
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def finish(error: ShimError | None) -> None:
        loop.forget(fd)
        os.close(fd)
        if exited in init.when_exited:
            init.when_exited.remove(exited)
        done(error)

    def written() -> bool:
        try:
            data = os.read(fd, 16)
        except BlockingIOError:
            return False
        if data:
            os.unlink(fifo)
            finish(None)
        return bool(data)

    def exited() -> None:
        # It may have been started and be done already, faster than the FIFO was read.
        if not written():
            finish(ShimError("FAILED_PRECONDITION", f"container {oci.id}: its process ended before it was started"))

    init.when_exited.append(exited)
    loop.watch(fd, select.POLLIN, lambda _: (written(), None)[1])


def _write(fifo: str) -> bool:
    """crun's container starts when somebody writes there; whether it has the byte."""
    try:
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # nobody reads: crun itself says why
    try:
        os.unlink(fifo)
        os.write(fd, b"\0")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def forget(oci: OciRuntime) -> bool:
    """Removes a stopped container's cgroups and the runtime's record of it, as `delete` does; whether all is gone."""
    found = _cgroups(oci)
    if oci.failed or oci.uses_systemd or not found or not all(cgroups.remove(path) for path in found):
        return False
    files.remove(oci.place)
    return not os.path.exists(oci.place)


def _cgroups(oci: OciRuntime) -> list[str]:
    """The directories of its cgroups; none where the record doesn't say, or says that there is more to be undone."""
    name = {"runc": "state.json", "crun": "status"}.get(oci.kind)
    try:
        record = codec.loads(files.read(f"{oci.place}/{name}")) if name else None
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        return []
    points = cgroups.points()
    if oci.kind == "runc":
        paths = [] if record.get("intel_rdt_path") else list((record.get("cgroup_paths") or {}).values())
    elif record.get("scope") or record.get("systemd-cgroup") or record.get("intelrdt"):
        paths = []
    else:
        paths = [f"{point}/{record.get('cgroup-path', '').strip('/')}".rstrip("/") for point in points]
    # A container may be in a cgroup that has others below it, as a hierarchy's root has everybody.
    return [] if any(path in points or ".." in path.split("/") for path in paths) else paths
