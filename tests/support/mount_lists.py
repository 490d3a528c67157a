"""Images with file systems in them, mount lists of these, and what there is of loop devices and activations."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from shoal_bus.types import Mount
from shoal_runtime.shim import loopback, mounts

from tests.support.leaks import mounts as mount_points
from tests.support.node import TestNode

_LET_GO_SECONDS = 10.0


def image(path: Path, *directories: str, kind: str = "ext4", mib: int = 0) -> Path:
    """A file with a file system in it, which has these directories."""
    with path.open("xb") as made:
        made.truncate((mib or (300 if kind == "xfs" else 8)) << 20)
    subprocess.run([f"mkfs.{kind}", "-q", path], check=True, capture_output=True)
    point = path.parent / f"{path.name}.mounted"
    point.mkdir()
    loopback.mount(kind, str(path), str(point), ["loop"])
    try:
        for name in directories:
            (point / name).mkdir(mode=0o755)
    finally:
        mounts.unmount_all(str(point))
        point.rmdir()
    return path


def loops(directory: Path) -> list[str]:
    """The loop devices that have a file below a directory in them."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if entry.read_text().startswith(f"{directory}/"):
                found.append(f"/dev/{entry.parent.parent.name}")
        except FileNotFoundError:
            continue  # it has just gone
    return sorted(found)


def no_loops(directory: Path) -> bool:
    """Whether there is none, once the kernel has let go of what was unmounted last.

    Another process's mount namespace may have been made with the mount in it, and takes it away a moment later.
    """
    deadline = time.monotonic() + _LET_GO_SECONDS
    while (found := loops(directory)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not found


def is_read_only(device: str) -> bool:
    """Whether nobody can write to a loop device."""
    return Path("/sys/block", Path(device).name, "ro").read_text() == "1\n"


def layered(image: Path, lower: Path, upper: str, *more: str, kind: str = "ext4") -> list[Mount]:
    """An overlay whose upper directory is in an image, over a directory of the host's and `more` of the image's."""
    lowers = ":".join([*(f"{{{{ mount 1 }}}}/{name}" for name in more), "{{ mount 0 }}"])
    return [
        Mount(type="bind", source=str(lower), options=["rbind", "ro"]),
        Mount(type=kind, source=str(image), options=["loop"]),
        Mount(
            type="format/overlay",
            source="overlay",
            options=[
                f"lowerdir={lowers}", f"upperdir={{{{ mount 1 }}}}/{upper}", "workdir={{ mount 1 }}/work", "index=off",
            ],
        ),
    ]  # fmt: skip


def places(node: TestNode) -> Path:
    """Where a node mounts what it activates."""
    return node.state / "runtime/mounts"


def left(node: TestNode) -> list[str]:
    """What there is of a node's activations: places, mounts and loop devices."""
    found = [str(path) for path in places(node).glob("*")]
    found += [point for point in mount_points() if point.startswith(f"{places(node)}/")]
    return found if no_loops(node.directory) else found + loops(node.directory)


def take_all_away(node: TestNode) -> None:
    """As a reboot does it: nothing is mounted any more, and no device has a file in it."""
    mounts.unmount_all(str(places(node)))
    for device in loops(node.directory):
        opened = os.open(device, os.O_RDONLY)
        loopback.set_autoclear(opened, True)
        os.close(opened)
