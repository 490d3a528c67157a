"""Mounts that are nowhere: made by the kernel's file descriptor API, used through a directory's file descriptor.

    with detached(mounts) as root_fd:
        os.listdir(root_fd)

Nobody else sees such a mount, and it goes with its last file descriptor, however the process ends. It's how a mount
list is read here (never written to), and how it is found out what the kernel can do.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from shoal_snapshot.apply.errors import Unacceptable

AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE = 1
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
MOUNT_ATTR_RDONLY, MOUNT_ATTR_IDMAP = 0x1, 0x100000
_OPEN_TREE, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 430, 431, 432, 442

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def call(number: int, what: str, *arguments: int | bytes | object | None) -> int:
    """A system call; OSError if it fails."""
    result = _libc.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)
    return int(result)


def open_tree(path: str) -> int:
    """A detached bind mount of a directory, without what is mounted below it."""
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC
    return call(_OPEN_TREE, path, AT_FDCWD, os.fsencode(path), flags)


def new_mount(kind: str, options: Sequence[str], *, source: str = "", read_only: bool = False) -> int:
    """A detached new mount. A `lowerdir` of any length is given layer by layer."""
    fs = call(_FSOPEN, kind, kind.encode(), FSOPEN_CLOEXEC)
    try:
        _set(fs, "source", source or kind)
        for option in options:
            key, equals, value = option.partition("=")
            if key == "lowerdir" and ":" in value and len(value) > 200:
                for layer in value.split(":"):
                    _set(fs, "lowerdir+", layer)
            elif equals:
                _set(fs, key, value)
            else:
                call(_FSCONFIG, f"{kind} option {key}", fs, FSCONFIG_SET_FLAG, key.encode(), None, 0)
        call(_FSCONFIG, kind, fs, FSCONFIG_CMD_CREATE, None, None, 0)
        return call(_FSMOUNT, kind, fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_RDONLY if read_only else 0)
    finally:
        os.close(fs)


def set_idmap(mount_fd: int, userns_fd: int) -> None:
    """Maps the owners of a detached mount by a user namespace's mappings (mount_setattr(2))."""
    attributes = _MountAttr(MOUNT_ATTR_IDMAP, 0, 0, userns_fd)
    call(
        _MOUNT_SETATTR, "mount_setattr", mount_fd, b"", AT_EMPTY_PATH | AT_RECURSIVE,
        ctypes.byref(attributes), ctypes.sizeof(attributes),
    )  # fmt: skip


def _set(fs: int, key: str, value: str) -> None:
    call(_FSCONFIG, f"option {key}", fs, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)


def overlay_directories(options: Sequence[str]) -> tuple[str, list[str]]:
    """The upper directory of an overlay mount (empty if it has none) and its lower ones, the highest first."""
    upper, lowers = "", []
    for option in options:
        key, _, value = option.partition("=")
        if key == "upperdir":
            upper = value
        elif key == "lowerdir":
            lowers = value.split(":")
    return upper, lowers


def _overlay(layers: Sequence[str], *, userxattr: bool) -> int:
    """A read-only overlay. What `metacopy` or `redirect_dir` left in a layer is followed, where the kernel can."""
    lowerdir = f"lowerdir={':'.join(layers)}"
    if userxattr:
        return new_mount("overlay", [lowerdir, "userxattr"], read_only=True)
    try:
        return new_mount("overlay", [lowerdir, "metacopy=on", "redirect_dir=follow"], read_only=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return new_mount("overlay", [lowerdir], read_only=True)


@contextmanager
def detached(mounts: Sequence[dict[str, object]]) -> Iterator[int]:
    """An open directory that shows what a mount list of this service's snapshots would, read-only.

    An overlay's upper directory is read as its uppermost lower one: it may be mounted elsewhere at the same time, and
    nothing is to be written to it. Owners are those on disk, whatever a mount maps them to. FAILED_PRECONDITION for
    other kinds of mounts.
    """
    if len(mounts) != 1 or mounts[0].get("target"):
        raise Unacceptable("a layer can't be made of these mounts: there must be one, on the root")
    kind, options = str(mounts[0]["type"]), [str(option) for option in mounts[0].get("options") or ()]  # type: ignore[attr-defined]
    with ExitStack() as stack:
        if "overlay" in kind:
            upper, lowers = overlay_directories(options)
            layers = [upper, *lowers] if upper else lowers
            mount = open_tree(layers[0]) if len(layers) == 1 else _overlay(layers, userxattr="userxattr" in options)
        elif kind == "bind" or {"bind", "rbind"} & set(options):
            mount = open_tree(str(mounts[0]["source"]))
        else:
            raise Unacceptable(f"a layer can't be made of a mount of type {kind}")
        stack.callback(os.close, mount)
        root = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        stack.callback(os.close, root)
        yield root
