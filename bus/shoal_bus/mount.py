"""A snapshot's `Mount` list mounted read-only on a directory of this process's mount namespace, and taken away again.

mount(2) by ctypes. An overlay of so many layers that its options don't fit a page is made layer by layer, by the newer
calls (fsopen(2), fsconfig(2), fsmount(2)), which take any number.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Mount

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 0x1, 0x2, 0x4, 0x20, 0x1000
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC, MOVE_MOUNT_F_EMPTY_PATH = 1, 1, 0x4
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 0x1, 0x2, 0x4
AT_FDCWD = -100
_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT = 430, 431, 432, 429
_PAGE = 4096
_GENERAL = frozenset({"ro", "rw", "bind", "rbind", "nosuid", "nodev"})
"""Options that are flags and not the file system's own."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def mount_read_only(mounts: Sequence[Mount], directory: Path) -> None:
    """Mounts a list of one entry, as that of a view is: without device nodes or setuid bits in effect. OSError."""
    if len(mounts) != 1 or mounts[0].target:
        raise FailedPrecondition("the snapshot has mounts within mounts, which can't be mounted read-only here")
    mount, target = mounts[0], os.fsencode(directory)
    if "fuse" in mount.type:
        raise FailedPrecondition(
            f"the snapshot is mounted by a program ({mount.type}), which can't be done here",
            hint="run a container of the image to look into it",
        )
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV
    if {"bind", "rbind"} & set(mount.options):
        # Only this one: what is mounted below it isn't the snapshot's. A bind takes its flags in a second call.
        _check(_libc.mount(os.fsencode(mount.source), target, None, MS_BIND, None), directory)
        try:
            _check(_libc.mount(None, target, None, MS_BIND | MS_REMOUNT | flags, None), directory)
        except OSError:
            unmount(directory)
            raise
        return
    data = [option for option in mount.options if option not in _GENERAL]
    joined = os.fsencode(",".join(data))
    if mount.type == "overlay" and len(joined) >= _PAGE:
        _mount_long_overlay(data, target, directory)
    else:
        _check(_libc.mount(os.fsencode(mount.source), target, mount.type.encode(), flags, joined), directory)


def unmount(directory: Path) -> bool:
    """Takes the topmost mount on a directory away, lazily if something still uses it; says whether there was one."""
    for flags in (UMOUNT_NOFOLLOW, UMOUNT_NOFOLLOW | MNT_DETACH):
        if _libc.umount2(os.fsencode(directory), flags) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOENT):
            return False
        if number != errno.EBUSY:
            raise OSError(number, os.strerror(number), str(directory))
    return False


def is_mounted(directory: Path) -> bool:
    """Whether a directory, by its real path, is a mount point of this mount namespace."""
    return os.fsencode(directory) in mount_points()


def mount_points() -> set[bytes]:
    """The mount points of this mount namespace (proc(5), mountinfo)."""
    return {_unescaped(line.split()[4]) for line in Path("/proc/self/mountinfo").read_bytes().splitlines()}


def _mount_long_overlay(data: list[str], target: bytes, directory: Path) -> None:
    fs = _check(_libc.syscall(_FSOPEN, b"overlay", FSOPEN_CLOEXEC), directory)
    try:
        for option in data:
            key, _, value = option.partition("=")
            if key == "lowerdir":
                for layer in value.split(":"):
                    _set(fs, b"lowerdir+", layer, directory)
            elif value:
                _set(fs, key.encode(), value, directory)
            else:
                _check(_libc.syscall(_FSCONFIG, fs, FSCONFIG_SET_FLAG, key.encode(), None, 0), directory)
        _check(_libc.syscall(_FSCONFIG, fs, FSCONFIG_CMD_CREATE, None, None, 0), directory)
        attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        made = _check(_libc.syscall(_FSMOUNT, fs, FSMOUNT_CLOEXEC, attributes), directory)
        try:
            _check(_libc.syscall(_MOVE_MOUNT, made, b"", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH), directory)
        finally:
            os.close(made)
    finally:
        os.close(fs)


def _set(fs: int, key: bytes, value: str, directory: Path) -> None:
    _check(_libc.syscall(_FSCONFIG, fs, FSCONFIG_SET_STRING, key, os.fsencode(value), 0), directory)


def _check(result: int, directory: Path) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(directory))
    return result


def _unescaped(field: bytes) -> bytes:
    for code in (b"\\040", b"\\011", b"\\012", b"\\134"):
        field = field.replace(code, bytes([int(code[1:], 8)]))
    return field
