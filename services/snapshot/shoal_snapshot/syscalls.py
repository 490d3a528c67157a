"""The kernel calls that Python's `os` doesn't have: openat2(2), syncfs(2), and a worker's tie to its parent."""

from __future__ import annotations

import ctypes
import os
import signal

_libc = ctypes.CDLL(None, use_errno=True)

SYS_OPENAT2 = 437
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
PR_SET_PDEATHSIG = 1


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def openat2(dir_fd: int, path: bytes, flags: int, *, resolve: int) -> int:
    """Opens `path` below `dir_fd` under the rules of `resolve`; the file descriptor is closed on exec."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    fd = _libc.syscall(SYS_OPENAT2, dir_fd, ctypes.c_char_p(path), ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        _raise(os.fsdecode(path))
    return int(fd)


def open_in_root(root_fd: int, path: bytes, flags: int) -> int:
    """Opens what lies at `path` inside the tree of `root_fd`: no link on the way is followed, and none leads out."""
    return openat2(root_fd, path or b".", flags, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)


def open_beneath(directory: str, path: str, flags: int) -> int:
    """Opens what lies at the relative `path` below `directory`; whatever leads out of that, or is a link, fails."""
    directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
        return openat2(directory_fd, os.fsencode(path), flags, resolve=resolve)
    finally:
        os.close(directory_fd)


def syncfs(path: str) -> None:
    """Writes everything of the file system that holds `path` to disk, and raises what went wrong with it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) < 0:
            _raise(path)
    finally:
        os.close(fd)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent `parent` dies, also when that was just now."""
    if _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) < 0:
        _raise("prctl")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)
