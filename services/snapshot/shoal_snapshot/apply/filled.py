"""Layers carried out on a directory that isn't empty: what they take away of what is there is removed.

A whiteout, also one that comes after them, takes nothing away that its own layer brings (OCI image-spec, layer.md), so
it is remembered what that was.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from shoal_snapshot import disk
from shoal_snapshot.apply import overlay
from shoal_snapshot.walking import Descent, names


class Filled:
    """What one layer has brought so far to a directory that others have filled."""

    def __init__(self) -> None:
        self._brought: set[bytes] = set()
        """Paths of the layer's entries, without links, and of the directories that these lie in."""

    def bring(self, path: bytes) -> bool:
        """Remembers an entry of the layer, and says whether it is the first one at its path."""
        first = path not in self._brought
        while path and path not in self._brought:
            self._brought.add(path)
            path = path.rpartition(b"/")[0]
        return first

    def take_away(self, path: bytes, name: bytes, dir_fd: int) -> bool:
        """Removes what others have put at `path`, which is `name` here; says whether anything may be gone."""
        if path not in self._brought:
            disk.remove(name, dir_fd)
            return True
        try:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(status.st_mode):
            return False
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            self.clear(path, fd)
        finally:
            os.close(fd)
        return True

    def clear(self, path: bytes, fd: int) -> None:
        """Removes what others have put into the open directory at `path`."""
        with Descent(fd) as place:
            trail, todo = [path], [names(fd)]
            while todo:
                if not todo[-1]:
                    todo.pop()
                    trail.pop()
                    if todo:
                        place.up()
                    continue
                name = todo[-1].pop()
                inner = trail[-1] + b"/" + name if trail[-1] else name
                if inner not in self._brought:
                    disk.remove(name, place.fd)
                elif stat.S_ISDIR(os.stat(name, dir_fd=place.fd, follow_symlinks=False).st_mode):
                    place.down(name)
                    trail.append(inner)
                    todo.append(names(place.fd))


def forget_xattrs(fd: int) -> None:
    """A directory that a layer describes anew has none of the attributes of the one that was here, but overlayfs's."""
    with suppress(OSError):  # a file system without them
        for key in os.listxattr(fd):
            if not key.startswith(overlay.PRIVATE):
                with suppress(OSError):  # those of security modules stay
                    os.removexattr(fd, key)
