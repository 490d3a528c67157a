"""Copies a tree with all there is to it: owners, modes, times, extended attributes, ACLs, hard links, devices, holes.

Bytes are shared where the file system can (FICLONE), and else copied inside the kernel, holes left out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress

from shoal_snapshot import disk
from shoal_snapshot.walking import Descent, names, open_parent

FICLONE = 0x40049409
_CANNOT_CLONE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM})
_CANNOT_COPY_RANGE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EIO, errno.EPERM})
_PIECE = 1 << 26


def copy_tree(source: str, target: str) -> None:
    """Copies what is in the directory `source`, and its own attributes, to the directory `target`, which is empty.

    Nobody else writes layers to it meanwhile. The process's umask must be 0.
    """
    with disk.opened(source) as source_fd, disk.locked(target) as target_fd:
        _Copy(source_fd, target_fd).run()


def clones(directory: str) -> bool:
    """Whether files in a directory can share their bytes."""
    try:
        fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        os.write(fd, b"x")
        other = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            fcntl.ioctl(other, FICLONE, fd)
        finally:
            os.close(other)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class _Copy:
    def __init__(self, source_fd: int, target_fd: int) -> None:
        self._source_root, self._target_root = source_fd, target_fd
        self._links: dict[tuple[int, int], bytes] = {}
        """Where a file with several names has been copied to, by its device and inode."""
        self._clone = True
        self._path: list[bytes] = []

    def run(self) -> None:
        with Descent(self._source_root) as source, Descent(self._target_root) as target:
            todo = [names(source.fd)[::-1]]
            while todo:
                if not todo[-1]:
                    todo.pop()
                    self._finish(source.fd, target.fd)
                    if todo:
                        source.up()
                        target.up()
                        self._path.pop()
                    continue
                name = todo[-1].pop()
                status = os.stat(name, dir_fd=source.fd, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):
                    self._entry(name, status, source.fd, target.fd)
                    continue
                os.mkdir(name, 0o700, dir_fd=target.fd)
                source.down(name)
                target.down(name)
                self._path.append(name)
                todo.append(names(source.fd)[::-1])

    def _entry(self, name: bytes, status: os.stat_result, source: int, target: int) -> None:
        if status.st_nlink > 1:
            identity = (status.st_dev, status.st_ino)
            there = self._links.get(identity)
            if there is not None:
                self._link(there, name, target)
                return
            self._links[identity] = b"/".join([*self._path, name])
        if stat.S_ISREG(status.st_mode):
            self._file(name, status, source, target)
            return
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        copy_xattrs(b"/proc/self/fd/%d/%s" % (source, name), b"/proc/self/fd/%d/%s" % (target, name))
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)

    def _link(self, there: bytes, name: bytes, target: int) -> None:
        parent = open_parent(self._target_root, there)
        try:
            os.link(there.rpartition(b"/")[2], name, src_dir_fd=parent, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(parent)

    def _file(self, name: bytes, status: os.stat_result, source: int, target: int) -> None:
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        read = os.open(name, os.O_RDONLY | flags, dir_fd=source)
        try:
            write = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=target)
            try:
                self._bytes(read, write, status.st_size)
                _attributes(read, write, status)
            finally:
                os.close(write)
        finally:
            os.close(read)

    def _bytes(self, read: int, write: int, size: int) -> None:
        if not size:
            return
        if self._clone:
            try:
                fcntl.ioctl(write, FICLONE, read)
                return
            except OSError as error:
                if error.errno not in _CANNOT_CLONE:
                    raise
                self._clone = False  # what lies below may be elsewhere, but all of it is in one place
        copy_bytes(read, write, size)

    @staticmethod
    def _finish(source: int, target: int) -> None:
        """Gives a directory its attributes: last, or what is made in it would inherit some."""
        _attributes(source, target, os.fstat(source))


def copy_bytes(read: int, write: int, size: int) -> None:
    """Copies a file's data into an empty one, and leaves its holes out."""
    os.ftruncate(write, size)
    at = 0
    while at < size:
        try:
            begin = os.lseek(read, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # a hole to the end
            raise
        end = min(size, os.lseek(read, begin, os.SEEK_HOLE))
        _copy_range(read, write, begin, end)
        at = end


def _copy_range(read: int, write: int, at: int, end: int) -> None:
    while at < end:
        try:
            copied = os.copy_file_range(read, write, min(end - at, _PIECE), at, at)
        except OSError as error:
            if error.errno not in _CANNOT_COPY_RANGE:
                raise
            data = os.pread(read, min(end - at, 1 << 20), at)
            copied = os.pwrite(write, data, at)
        if not copied:
            return  # it became shorter
        at += copied


def _attributes(source: int, target: int, status: os.stat_result) -> None:
    os.fchown(target, status.st_uid, status.st_gid)
    copy_xattrs(source, target)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_xattrs(source: int | bytes, target: int | bytes) -> None:
    """Copies extended attributes, ACLs among them, without following a link; a file system without them has none."""
    follow = isinstance(source, int)
    try:
        keys = os.listxattr(source, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return
        raise
    for key in keys:
        value = os.getxattr(source, key, follow_symlinks=follow)
        if key.startswith("security.") and key != "security.capability":
            with suppress(OSError):  # labels are the host's security module's, which gives every new file its own
                os.setxattr(target, key, value, follow_symlinks=follow)
        else:
            os.setxattr(target, key, value, follow_symlinks=follow)
