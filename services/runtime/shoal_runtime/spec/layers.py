"""Reads a file of a root file system that isn't mounted: through the directories its `Mount` list names.

Overlayfs's rules, followed by hand (kernel documentation, filesystems/overlayfs.rst): upper before lower, whiteouts,
opaque directories. Every step opens one name in one directory and follows no link: links are resolved here, against
the merged tree, so nothing in a layer can name a file outside it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Mount

MAX_BYTES = 4 << 20
_MAX_LINKS = 40
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")


def read_file(rootfs: Sequence[Mount], path: str) -> bytes | None:
    """The bytes of a regular file of `rootfs`, or None when there is none.

    FAILED_PRECONDITION when it is larger than 4 MiB, or for a file system that isn't made of directories.
    """
    with ExitStack() as stack:
        root = [_open_root(stack, directory) for directory in directories(rootfs)]
        return _read(stack, root, path) if root else None


def directories(rootfs: Sequence[Mount]) -> list[str]:
    """The directories that a `Mount` list shows as one, the uppermost first."""
    if not rootfs:
        return []
    mount = next((m for m in reversed(rootfs) if not m.target), rootfs[-1])
    if mount.type in ("overlay", "fuse3.fuse-overlayfs"):
        options = dict(one.partition("=")[::2] for one in mount.options)
        upper = [options["upperdir"]] if options.get("upperdir") else []
        return [_unescape(one) for one in upper + _split(options.get("lowerdir", ""))]
    if mount.type in ("bind", "rbind") or {"bind", "rbind"} & set(mount.options):
        return [mount.source]
    raise FailedPrecondition(f"users can't be looked up in a root file system of type {mount.type}")


def _split(lowerdir: str) -> list[str]:
    """`lowerdir` at its colons, of which `\\:` isn't one."""
    found, current, escaped = [], "", False
    for char in lowerdir:
        if char == ":" and not escaped:
            found.append(current)
            current = ""
        else:
            current += char
        escaped = char == "\\" and not escaped
    return [one for one in [*found, current] if one]


def _unescape(path: str) -> str:
    return path.replace("\\:", ":").replace("\\\\", "\\")


def _open_root(stack: ExitStack, directory: str) -> int:
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _read(stack: ExitStack, root: list[int], path: str) -> bytes | None:
    names = [name for name in reversed(path.split("/")) if name not in ("", ".")]
    trail = [root]  # the merged directories from the root to here
    links = 0
    while names:
        name = names.pop()
        if name == "..":
            trail = trail[:-1] or [root]
            continue
        found = _look_up(stack, trail[-1], name)
        if isinstance(found, list):
            trail.append(found)
        elif found is None:
            return None
        elif stat.S_ISLNK(os.stat(name, dir_fd=found, follow_symlinks=False).st_mode):
            links += 1
            if links > _MAX_LINKS:
                return None
            target = os.readlink(name, dir_fd=found)
            if target.startswith("/"):
                trail = [root]
            names += [part for part in reversed(target.split("/")) if part not in ("", ".")]
        else:
            return _read_regular(found, name) if not names else None
    return None


def _look_up(stack: ExitStack, layers: list[int], name: str) -> list[int] | int | None:
    """What `name` is in a merged directory: a merged directory, the layer that has it as something else, or nothing."""
    merged: list[int] = []
    for layer in layers:
        try:
            status = os.stat(name, dir_fd=layer, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not stat.S_ISDIR(status.st_mode):
            whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
            return merged or (None if whiteout else layer)
        fd = os.open(name, _DIRECTORY, dir_fd=layer)
        stack.callback(os.close, fd)
        merged.append(fd)
        if _is_opaque(fd):
            break
    return merged or None


def _is_opaque(fd: int) -> bool:
    for name in _OPAQUE:
        with suppress(OSError):
            if os.getxattr(f"/proc/self/fd/{fd}", name) == b"y":
                return True
    return False


def _read_regular(layer: int, name: str) -> bytes | None:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=layer)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        if status.st_size > MAX_BYTES:
            raise FailedPrecondition(f"{name} of the image has {status.st_size} bytes, at most {MAX_BYTES} are read")
        return file.read(MAX_BYTES)
