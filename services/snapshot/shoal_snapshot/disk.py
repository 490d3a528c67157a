"""Trees on disk: what one takes, who writes to it, and how it is emptied.

Their depth is whatever a container or an archive made it: nothing here recurses, holds a file descriptor for each
level, or names anything by a path of its own making.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from shoal_snapshot.apply.overlay import PRIVATE
from shoal_snapshot.walking import names

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATIENCE_SECONDS = 10.0


@contextmanager
def opened(path: str) -> Iterator[int]:
    """An open directory."""
    fd = os.open(path, _DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked(path: str) -> Iterator[int]:
    """An open directory that nobody else has locked meanwhile, to write layers, say (flock(2)): waits for others."""
    with opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd


@contextmanager
def scratch(path: str, prefix: bytes) -> Iterator[bytes]:
    """The name of a new directory in a directory, for what is tried there, with all in it removed afterwards.

    One process at a time has one, and removes first what another that was killed meanwhile has left.
    """
    with locked(path) as fd:
        for old in names(fd):
            if old.startswith(prefix):
                remove(old, fd)
        name = prefix + secrets.token_hex(6).encode()
        os.mkdir(name, 0o700, dir_fd=fd)
        try:
            yield name
        finally:
            remove(name, fd)


def empty(path: str) -> None:
    """Removes everything in a directory, and overlayfs's marks on it, once nobody writes layers to it any more."""
    with locked(path) as fd:
        empty_directory(fd)
        for key in os.listxattr(fd):
            if key.startswith(PRIVATE):
                os.removexattr(fd, key)


def empty_directory(fd: int) -> None:
    """Removes everything in an open directory, also what others remove or (a dying process) make there meanwhile."""
    for name in os.listdir(fd):
        remove(os.fsencode(name), fd)


def remove(name: bytes, dir_fd: int) -> None:
    """Removes a file, or a directory with all that is in it: what lies deeper is moved up beside it first."""
    todo = [name]
    ends = time.monotonic() + _PATIENCE_SECONDS
    while todo:
        name = todo.pop()
        if _unlinked(name, dir_fd):
            continue
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
        except FileNotFoundError:
            continue
        try:
            for entry in os.listdir(fd):  # noqa: PTH208 (an open directory)
                if not _unlinked(os.fsencode(entry), fd):
                    aside = b"." + os.urandom(8).hex().encode()
                    with suppress(FileNotFoundError):
                        os.rename(entry, aside, src_dir_fd=fd, dst_dir_fd=dir_fd)
                        todo.append(aside)
        finally:
            os.close(fd)
        try:
            os.rmdir(name, dir_fd=dir_fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > ends:
                raise
            todo.append(name)


def _unlinked(name: bytes, dir_fd: int) -> bool:
    """Unlinks whatever isn't a directory, and says whether it was none."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        return False
    return True


@dataclass
class _Level:
    """A directory on the way down: who it is, and what is still to be looked at in it."""

    identity: tuple[int, int]
    subdirectories: list[str]


def usage(path: str) -> tuple[int, int]:
    """Bytes (blocks that are really there) and inodes of a tree, its root included; a hard link counts once.

    The tree may change meanwhile: what is gone, or has been moved, by the time it is looked at isn't counted.
    """
    linked: dict[tuple[int, int], int] = {}  # files with several names, and how many of those haven't been met
    size = inodes = 0

    def look(fd: int) -> _Level:
        nonlocal size, inodes
        subdirectories = []
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        size += status.st_blocks * 512
        inodes += 1
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    subdirectories.append(entry.name)
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_nlink > 1:
                        file = status.st_dev, status.st_ino
                        left = linked.pop(file, 0)
                        if left != 1:
                            linked[file] = (left or status.st_nlink) - 1
                        if left:
                            continue
                    size += status.st_blocks * 512
                    inodes += 1
        return _Level(identity, subdirectories)

    fd = os.open(path, _DIRECTORY)
    try:
        levels = [look(fd)]
        while True:
            if levels[-1].subdirectories:
                try:
                    child = os.open(levels[-1].subdirectories.pop(), _DIRECTORY, dir_fd=fd)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                os.close(fd)
                fd = child
                levels.append(look(fd))
                continue
            levels.pop()
            if not levels:
                return size, inodes
            parent = os.open("..", _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = parent
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != levels[-1].identity:
                return size, inodes  # moved away under us: the way back is lost
    finally:
        os.close(fd)
