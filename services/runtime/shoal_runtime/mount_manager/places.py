"""Where activations are mounted: a directory for each, below the state directory, and in it a name for each mount.

The names are numbers, in the list's order. One is a directory that something is mounted on, or, of a loop, a link to
the device. So what there is to be taken away is seen from the directory alone, whoever was killed at whatever point.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog
from shoal_bus.api.runtime import ActiveMount
from shoal_bus.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, ShoalError, from_exception
from shoal_bus.message import now
from shoal_bus.mount import mount_points
from shoal_bus.types import Mount

from shoal_runtime.mount_manager.directories import with_directories
from shoal_runtime.mount_manager.filesystems import with_file_system
from shoal_runtime.mount_manager.plan import FORMAT, LOOP, MKDIR, Plan, Step
from shoal_runtime.mount_manager.templates import filled_in
from shoal_runtime.shim import loopback, mounts

log = structlog.get_logger(__name__)


class Places:
    """A node's, in `directory`; `roots` are what transforms may make files and directories in. Everything blocks."""

    def __init__(self, directory: Path, roots: Sequence[Path]) -> None:
        # What is a link stays one: both are compared with, or told as, paths of clients'.
        self._directory = Path(os.path.abspath(directory))  # noqa: PTH100
        self._roots = [Path(os.path.abspath(root)) for root in roots]  # noqa: PTH100

    def all(self) -> list[str]:
        """The places there are."""
        return sorted(entry.name for entry in self._directory.iterdir()) if self._directory.is_dir() else []

    def is_there(self, name: str) -> bool:
        """Whether there is one of that name."""
        return (self._directory / name).exists()

    def carry_out(self, name: str, plan: Plan) -> tuple[list[ActiveMount], list[Mount]]:
        """Mounts what is to be mounted, at a place of that name, and says what is left; if it fails, nothing is."""
        place = self._directory / name
        place.mkdir(mode=0o700, parents=True)
        active: list[ActiveMount] = []
        try:
            for number, step in enumerate(plan.here):
                with _told(step.mount):
                    mount = self._transformed(step, active)
                    point = place / str(number)
                    data = _attach(mount, point) if mount.type == LOOP else _mount(mount, point)
                active.append(ActiveMount(mount=mount, mounted_at=now(), mount_point=str(point), data=data))
            left = []
            for step in plan.left:
                with _told(step.mount):
                    left.append(self._transformed(step, active))
        except BaseException:
            try:
                self.take_down(name)
            except (OSError, ShoalError):
                log.exception("mounts.not_undone", place=str(place))
            raise
        if plan.bound:
            left = [Mount(type="bind", source=active[-1].mount_point, options=["rbind"])]
        return active, left

    def take_down(self, name: str) -> None:
        """Takes away what is mounted at a place, the last first, and the place itself; nothing there is no error."""
        place = self._directory / name
        for entry in reversed(list(_numbered(place))):
            if entry.is_symlink():
                _detach(entry)
            else:
                mounts.unmount_all(str(entry))
                entry.rmdir()  # of what isn't unmounted this fails, and nothing of it is deleted
        with suppress(FileNotFoundError):
            place.rmdir()

    def are_there(self, active: Sequence[ActiveMount]) -> bool:
        """Whether all of an activation's mounts are still made: after a reboot they aren't."""
        points = mount_points()
        return all(
            _is_attached(Path(one.mount_point))
            if one.mount.type == LOOP
            else os.fsencode(os.path.realpath(one.mount_point)) in points
            for one in active
        )

    def _transformed(self, step: Step, active: Sequence[ActiveMount]) -> Mount:
        mount = step.mount
        for transform in step.transforms:
            if transform == FORMAT:
                mount = filled_in(mount, active)
            elif transform == MKDIR:
                mount = with_directories(self._roots, mount)
            else:
                mount = with_file_system(self._roots, mount)
        return mount


def _numbered(place: Path) -> Iterator[Path]:
    names = [entry.name for entry in place.iterdir()] if place.is_dir() else []
    return (place / name for name in sorted(names, key=lambda name: int(name) if name.isdigit() else -1))


@contextmanager
def _told(mount: Mount) -> Iterator[None]:
    """What the kernel says of a mount, as an error that says which one it is."""
    try:
        yield
    except OSError as error:
        told = from_exception(error)
        if isinstance(told, ResourceExhausted):
            raise told from None
        at = f" ({error.filename})" if error.filename else ""
        raise FailedPrecondition(f"mount {mount.type} of {mount.source}: {error.strerror}{at}") from None


def _mount(mount: Mount, point: Path) -> dict[str, str]:
    if mount.target:
        raise InvalidArgument(
            f"mount {mount.type} on {mount.target}: it is mounted in a directory of its own, and can't have a target"
        )
    point.mkdir(mode=0o700)
    mounts.mount(mount.type, mount.source, str(point), mount.options)
    return {}


def _attach(mount: Mount, point: Path) -> dict[str, str]:
    flags, _, data = mounts.parse_options(mount.options)
    unknown = set(data) - {"direct-io", "loop"}  # those of every mount, as `sync`, mean nothing to a device
    if unknown:
        raise InvalidArgument(f"mount loop: option {min(unknown)}: is none", hint="there are ro, rw and direct-io")
    device, path = loopback.attach(
        mount.source,
        read_only=bool(flags & mounts.MS_RDONLY),
        direct="direct-io" in mount.options,
        name=_name_of(point),
    )
    try:
        point.symlink_to(path)
        loopback.set_autoclear(device, False)  # until here it would have gone with us
    finally:
        os.close(device)
    return {"device": path}


def _name_of(point: Path) -> str:
    """What a device is told by: the same whatever path the state directory is found by."""
    return f"shoal/{point.parent.name}/{point.name}"


def _detach(point: Path) -> None:
    """Has a device go when nobody uses it any more; one that has been given to somebody else meanwhile is let be."""
    device = _own_device(point)
    if device is None:
        point.unlink()
        return
    try:
        loopback.set_autoclear(device, True)
        try:
            point.unlink()
        except BaseException:
            loopback.set_autoclear(device, False)
            raise
    finally:
        os.close(device)


def _is_attached(point: Path) -> bool:
    device = _own_device(point)
    if device is not None:
        os.close(device)
    return device is not None


def _own_device(point: Path) -> int | None:
    """The device behind a link, open, if it still has the file in it that was put there for this link."""
    try:
        device = os.open(point, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if loopback.is_named(device, _name_of(point)):
            return device
    except OSError:
        pass  # no loop device at all
    os.close(device)
    return None
