"""The system calls that Python 3.11 doesn't have: mounts, and moving a thread between namespaces."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SHARED = 1 << 20
MNT_DETACH = 2
AT_FDCWD = -100
RENAME_NOREPLACE = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, filename: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), filename)


def mount(source: str, target: Path, flags: int) -> None:
    """mount(2), without a file system type or data: bind mounts and propagation."""
    _check(_libc.mount(source.encode(), os.fsencode(target), b"none", ctypes.c_ulong(flags), None), str(target))


def unmount(target: Path) -> None:
    """Every mount on `target`, lazily; none there, or nothing there at all, is no error."""
    while _libc.umount2(os.fsencode(target), MNT_DETACH) == 0:
        pass  # a mount may lie on another one where the directory was mounted on itself since
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOENT):
        raise OSError(number, os.strerror(number), str(target))


def rename_new(source: Path, target: Path) -> None:
    """rename(2) that never replaces what is there: FileExistsError."""
    paths = os.fsencode(source), os.fsencode(target)
    _check(_libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_NOREPLACE), str(target))


def unshare_network(what: str) -> None:
    """Gives the calling thread a new network namespace; `what` goes into the error."""
    _check(_libc.unshare(CLONE_NEWNET), what)


def enter_network(path: Path) -> None:
    """Moves the calling thread into the network namespace at `path`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, CLONE_NEWNET), str(path))
    finally:
        os.close(fd)
