"""A walk through a tree of whatever depth, by open directories: no recursion, no path longer than the kernel takes.

Nobody may move directories about in it meanwhile; where that happens, it is an error and no walk elsewhere.
"""

from __future__ import annotations

import errno
import os

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST_PATH = 4000


class Descent:
    """One open directory of a tree, that goes down into a directory of it and up again.

    with Descent(root_fd) as place:
        place.down(b"usr"); place.fd; place.up()
    """

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        os.set_inheritable(self.fd, False)
        self._above: list[tuple[int, int]] = []

    def __enter__(self) -> Descent:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def down(self, name: bytes) -> None:
        """Into a directory here."""
        status = os.fstat(self.fd)
        below = os.open(name, DIRECTORY, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = below
        self._above.append((status.st_dev, status.st_ino))

    def up(self) -> None:
        """Back to where the last `down` came from. OSError (ESTALE) if that has been moved away."""
        above = os.open(b"..", DIRECTORY, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = above
        status = os.fstat(above)
        if (status.st_dev, status.st_ino) != self._above.pop():
            raise OSError(errno.ESTALE, "a directory was moved while its tree was read")


def names(fd: int) -> list[bytes]:
    """What an open directory holds, sorted by bytes."""
    return sorted(os.fsencode(name) for name in os.listdir(fd))


def open_parent(root_fd: int, path: bytes) -> int:
    """The directory that `path` (no links in it, relative to the root) lies in, however long that is."""
    directory = path.rpartition(b"/")[0]
    fd = os.open(b".", DIRECTORY, dir_fd=root_fd)
    while directory:
        step, directory = _step(directory)
        below = os.open(step, DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def _step(path: bytes) -> tuple[bytes, bytes]:
    if len(path) <= _LONGEST_PATH:
        return path, b""
    cut = path.rindex(b"/", 0, _LONGEST_PATH)
    return path[:cut], path[cut + 1 :]
