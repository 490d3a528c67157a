"""btrfs's subvolumes, by its ioctls (linux/btrfs.h): made, snapshotted, limited, deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from shoal_snapshot import disk
from shoal_snapshot.walking import Descent, names

BTRFS_IOC_SUBVOL_CREATE, BTRFS_IOC_SNAP_DESTROY = 0x5000940E, 0x5000940F
BTRFS_IOC_SNAP_CREATE_V2 = 0x50009417
BTRFS_IOC_QGROUP_LIMIT = 0x8030942B
BTRFS_QGROUP_LIMIT_MAX_EXCL = 2
BTRFS_FIRST_FREE_OBJECTID = 256
"""The inode of every subvolume's root directory."""
_NAME, _NAME_V2 = 4088, 4040
_PROBE = b".probe-"
_NO_SUBVOLUMES = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM})


def create(parent_fd: int, name: bytes) -> None:
    """A new, empty subvolume in an open directory."""
    fcntl.ioctl(parent_fd, BTRFS_IOC_SUBVOL_CREATE, _volume(name))


def snapshot(source_fd: int, parent_fd: int, name: bytes) -> None:
    """A writable snapshot of the subvolume whose root is `source_fd`, in an open directory."""
    arguments = struct.pack("qQQ4Q", source_fd, 0, 0, 0, 0, 0, 0) + name.ljust(_NAME_V2, b"\0")
    fcntl.ioctl(parent_fd, BTRFS_IOC_SNAP_CREATE_V2, bytearray(arguments))


def limit(fd: int, size: int) -> None:
    """Lets a subvolume have no more than `size` bytes of its own. OSError (ENOTCONN) where quotas aren't enabled."""
    group = 0  # the subvolume's own
    fcntl.ioctl(fd, BTRFS_IOC_QGROUP_LIMIT, struct.pack("QQQQQQ", group, BTRFS_QGROUP_LIMIT_MAX_EXCL, 0, size, 0, 0))


def is_subvolume(status: os.stat_result) -> bool:
    """Whether a directory of a btrfs is the root of a subvolume."""
    return stat.S_ISDIR(status.st_mode) and status.st_ino == BTRFS_FIRST_FREE_OBJECTID


def supported(directory: str) -> bool:
    """Whether subvolumes can be made, and deleted, in a directory: tried."""
    try:
        with scratch(directory, _PROBE):
            return True
    except OSError as error:
        if error.errno in _NO_SUBVOLUMES:
            return False
        raise


@contextmanager
def scratch(directory: str, prefix: bytes) -> Iterator[int]:
    """An open, new subvolume for what is tried on it, deleted afterwards.

    One process at a time has one, and deletes first what another that was killed meanwhile has left.
    """
    with disk.locked(directory) as parent:
        for old in names(parent):
            if old.startswith(prefix):
                destroy(parent, old)
        name = prefix + secrets.token_hex(6).encode()
        create(parent, name)
        try:
            with disk.opened(f"/proc/self/fd/{parent}/{os.fsdecode(name)}") as fd:
                yield fd
        finally:
            destroy(parent, name)


def destroy(parent_fd: int, name: bytes) -> None:
    """Deletes a subvolume with all that is in it, also further subvolumes. Nothing happens if it isn't there."""
    try:
        fcntl.ioctl(parent_fd, BTRFS_IOC_SNAP_DESTROY, _volume(name))
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        _destroy_nested(parent_fd, name)
        fcntl.ioctl(parent_fd, BTRFS_IOC_SNAP_DESTROY, _volume(name))


def nested(fd: int) -> list[bytes]:
    """The subvolumes in an open subvolume, by their paths, those that lie in others before these."""
    found: list[bytes] = []
    with Descent(fd) as place:
        trail, todo = [b""], [names(place.fd)]
        while todo:
            if not todo[-1]:
                todo.pop()
                path = trail.pop()
                if path and os.fstat(place.fd).st_ino == BTRFS_FIRST_FREE_OBJECTID:
                    found.append(path)
                if todo:
                    place.up()
                continue
            name = todo[-1].pop()
            if stat.S_ISDIR(os.stat(name, dir_fd=place.fd, follow_symlinks=False).st_mode):
                place.down(name)
                trail.append(trail[-1] + b"/" + name if trail[-1] else name)
                todo.append(names(place.fd))
    return found


def _destroy_nested(parent_fd: int, name: bytes) -> None:
    with Descent(parent_fd) as place:
        place.down(name)
        trail, todo = [name], [names(place.fd)]
        while todo:
            if not todo[-1]:
                todo.pop()
                inner = trail.pop()
                subvolume = is_subvolume(os.fstat(place.fd))
                place.up()
                if subvolume and todo:
                    fcntl.ioctl(place.fd, BTRFS_IOC_SNAP_DESTROY, _volume(inner))
                continue
            entry = todo[-1].pop()
            if stat.S_ISDIR(os.stat(entry, dir_fd=place.fd, follow_symlinks=False).st_mode):
                place.down(entry)
                trail.append(entry)
                todo.append(names(place.fd))


def _volume(name: bytes) -> bytearray:
    # Mutable, or ioctl would take no more than 1024 bytes.
    return bytearray(struct.pack("q", 0) + name.ljust(_NAME, b"\0"))
