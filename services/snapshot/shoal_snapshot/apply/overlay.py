"""How overlayfs marks what a layer takes away (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
directories"), and how the layers below look through those marks."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

OPAQUE = "trusted.overlay.opaque"
USER_OPAQUE = "user.overlay.opaque"
"""The same for mounts with `userxattr`: where `trusted.*` may not be written."""
PRIVATE = ("trusted.overlay.", "user.overlay.", "user.fuseoverlayfs.")
"""Attributes that are overlayfs's own, or fuse-overlayfs's; a layer doesn't bring any."""
_ABSENT = frozenset({errno.ENODATA, errno.ENOTSUP})


@dataclass(frozen=True, slots=True)
class Below:
    """What the layers below have at a path: the first layer's file, and for a directory every one it is merged of."""

    status: os.stat_result
    paths: tuple[bytes, ...]


def is_whiteout(status: os.stat_result) -> bool:
    """Whether this marks a file of a lower layer as removed: a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: bytes | int) -> bool:
    """Whether this directory hides what lower layers have in it."""
    return _marked(path, OPAQUE) or _marked(path, USER_OPAQUE)


def make_opaque(fd: int) -> None:
    """Has an open directory hide what lower layers have in it."""
    try:
        os.setxattr(fd, OPAQUE, b"y")
    except PermissionError:
        os.setxattr(fd, USER_OPAQUE, b"y")


def _marked(path: bytes | int, mark: str) -> bool:
    try:
        return os.getxattr(path, mark) == b"y"
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise


def whiteout(name: bytes, dir_fd: int) -> None:
    """Marks `name` as removed."""
    os.mknod(name, stat.S_IFCHR, 0, dir_fd=dir_fd)


def hides(name: bytes, dir_fd: int) -> bool:
    """Whether `name` is marked as removed already."""
    try:
        return is_whiteout(os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
    except FileNotFoundError:
        return False


def look_below(directories: Sequence[bytes], name: bytes) -> Below | None:
    """What `name` is in a directory that is merged of `directories`, the highest first; None if it isn't there.

    The directories belong to committed snapshots, which nobody changes, and no link is followed.
    """
    first: os.stat_result | None = None
    found: list[bytes] = []
    for directory in directories:
        path = directory + b"/" + name
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        if is_whiteout(status):
            break
        if not stat.S_ISDIR(status.st_mode):
            return Below(status, (path,)) if first is None else Below(first, tuple(found))
        first = first or status
        found.append(path)
        if is_opaque(path):
            break
    return Below(first, tuple(found)) if first is not None else None


def hide_names(lowers: Sequence[bytes], root_fd: int) -> list[bytes]:
    """Hides all that layers below have in their roots, name by name: the kernel doesn't look whether a root is opaque.

    What isn't done yet are the directories that the uppermost root has at such names, which are returned.
    """
    there: list[bytes] = []
    for name in sorted({name for lower in lowers for name in os.listdir(lower)}):  # noqa: PTH208 (bytes)
        if look_below(lowers, name) is None:
            continue
        try:
            whiteout(name, root_fd)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(name, dir_fd=root_fd, follow_symlinks=False).st_mode):
                there.append(name)
    return there
