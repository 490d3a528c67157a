"""What this kernel's overlayfs can do with a directory: each thing tried once, on mounts that are nowhere.

Sysfs says what a module's defaults are, and the kernel's version what it ought to know; whether it works (in a user
namespace, on this file system) only a mount says.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shoal_snapshot import disk, mounting

_PARAMETERS = Path("/sys/module/overlay/parameters")
_TRUSTED = "trusted.overlay.opaque"
_PROBE = b"probe-"


@dataclass(frozen=True)
class Features:
    """What to mount with, and what else there is."""

    options: tuple[str, ...]
    """Of every overlay mount.

    `index=off`: two overlays of one upper directory, one after another and on other lower layers, are a snapshotter's
    normal case. `metacopy=off` and `redirect_dir=off`, where the kernel's default is on: a layer must hold what it
    changes, with its bytes and in its place; other layers, diffs and users' look-ups read it without its lower ones.
    `userxattr`, where this process may not write `trusted.*`.
    """
    volatile: bool
    """A mount may skip all syncs."""


def probe(directory: Path) -> Features:
    """Tries overlayfs on a directory's file system. OSError: the kernel can't."""
    with disk.scratch(str(directory), _PROBE) as made:
        place = directory / os.fsdecode(made)
        lower = place / "lower"
        lower.mkdir()
        options = []
        if (_PARAMETERS / "index").exists():
            options.append("index=off")
        if not _trusted(lower):
            options.append("userxattr")
        else:
            options += [f"{name}=off" for name in ("metacopy", "redirect_dir") if _on(name)]
        _mount(place, "plain", options)
        return Features(tuple(options), volatile=_can(place, "volatile", [*options, "volatile"]))


def _trusted(directory: Path) -> bool:
    try:
        os.setxattr(directory, _TRUSTED, b"n")
        os.removexattr(directory, _TRUSTED)
    except PermissionError:
        return False
    return True


def _on(name: str) -> bool:
    try:
        return (_PARAMETERS / name).read_text().strip() in ("Y", "on", "1")
    except FileNotFoundError:
        return False


def _mount(place: Path, name: str, options: list[str]) -> None:
    upper, work = place / f"{name}-upper", place / f"{name}-work"
    upper.mkdir()
    work.mkdir()
    fd = mounting.new_mount(
        "overlay", [f"lowerdir={place / 'lower'}", f"upperdir={upper}", f"workdir={work}", *options]
    )
    try:
        made = os.open(b"file", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=fd)  # it isn't read-only
        os.close(made)
    finally:
        os.close(fd)


def _can(place: Path, name: str, options: list[str]) -> bool:
    try:
        _mount(place, name, options)
    except OSError:
        return False
    return True
