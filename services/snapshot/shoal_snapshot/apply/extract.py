"""Writes the entries of a layer into a directory (OCI image-spec, layer.md, "Applying Changesets").

The later of two entries with one name wins. Whiteouts become what overlayfs understands where there are layers below,
removals of what the directory holds already, and nothing where there is nothing. The archive's own root entry is
passed over, as containerd does: many tools write whatever directory they happened to run in.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal_bus.archive.tar import (
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    HARDLINK,
    REGULAR,
    SYMLINK,
    Entry,
    TarReader,
)  # fmt: skip

from shoal_snapshot import disk
from shoal_snapshot.apply import overlay
from shoal_snapshot.apply.directories import Attributes, Directories, Directory, read_xattrs, set_xattrs
from shoal_snapshot.apply.errors import NeedsParent, Unacceptable, of_os_error, shown
from shoal_snapshot.apply.filled import Filled, forget_xattrs

MAX_ENTRIES = 10_000_000
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_DEVICES = {CHARACTER: stat.S_IFCHR, BLOCK_DEVICE: stat.S_IFBLK, FIFO: stat.S_IFIFO}


@dataclass(frozen=True)
class Extracted:
    """What an extraction came to: how many entries there were, and the directories that `attach` has to look after."""

    entries: int
    implied: dict[bytes, bool]


def extract(
    reader: TarReader, root: str, lowers: Sequence[str] = (), *, detached: bool = False, filled: bool = False
) -> Extracted:
    """Extracts an archive into `root`, whose layers below are `lowers`. The process's umask must be 0.

    `detached`: there are layers below, but nobody knows yet what they hold. NeedsParent where that matters. `filled`:
    there is something in `root` that the archive may take away: another layer, or all that its parents make together.
    """
    directories = Directories(root, lowers, detached=detached)
    extractor = _Extractor(reader, directories, bool(lowers) or detached, Filled() if filled else None)
    count = 0
    try:
        for entry in reader:
            count += 1
            if count > MAX_ENTRIES:
                raise Unacceptable(f"the layer has more than {MAX_ENTRIES} entries")
            try:
                extractor.add(entry)
            except OSError as error:
                refusal = of_os_error(error, shown(entry.name))
                if detached and isinstance(refusal, Unacceptable):
                    raise NeedsParent from error
                raise refusal from error
            except Unacceptable as error:
                if detached:
                    raise NeedsParent from error  # on top of the others it may be right, or wrong in another way
                raise
        try:
            directories.finish()
        except OSError as error:
            raise of_os_error(error, "a directory's attributes") from error
    finally:
        directories.close()
    reader.drain()
    return Extracted(count, directories.implied)


class _Extractor:
    def __init__(self, reader: TarReader, directories: Directories, layered: bool, filled: Filled | None) -> None:
        self._reader, self._directories, self._layered, self._filled = reader, directories, layered, filled

    def add(self, entry: Entry) -> None:
        path = _clean(entry.name)
        if not path:
            return
        self._directories.settle()
        parent_path, _, name = path.rpartition(b"/")
        parent = self._directories.resolve(parent_path)
        self._directories.cover(parent, name.removeprefix(_WHITEOUT))
        if name.startswith(_WHITEOUT):
            self._white_out(parent, name)
            return
        first = self._filled is not None and self._filled.bring(_join(parent, name))
        if entry.kind == REGULAR:
            self._file(entry, parent, name)
        elif entry.kind == DIRECTORY:
            self._directory(entry, parent, name, anew=first)
        elif entry.kind == HARDLINK:
            self._hardlink(entry, parent, name)
        elif entry.kind == SYMLINK:
            if not entry.link:
                raise Unacceptable(f"{shown(entry.name)}: a symbolic link to nothing")
            self._make(parent, name, lambda fd: os.symlink(entry.link, name, dir_fd=fd))
            self._attributes(entry, parent, name, mode=False)
        else:
            self._make(parent, name, lambda fd: self._node(entry, name, fd))
            self._attributes(entry, parent, name)

    # ------------------------------------------------------------------------------------------------------------ kinds

    def _file(self, entry: Entry, parent: Directory, name: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, entry.mode & 0o777, dir_fd=self._directories.fd(parent))
        except FileExistsError:
            self._remove(parent, name)
            fd = os.open(name, flags, entry.mode & 0o777, dir_fd=self._directories.fd(parent))
        try:
            for piece in self._reader.data():
                rest = piece
                while rest:
                    rest = rest[os.write(fd, rest) :]
            if entry.uid or entry.gid or parent.inherits:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                set_xattrs(fd, entry.xattrs, entry.name)
            if entry.mode & 0o7000 or entry.xattrs:
                os.fchmod(fd, entry.mode)
            os.utime(fd, ns=(entry.atime, entry.mtime))
        finally:
            os.close(fd)

    def _directory(self, entry: Entry, parent: Directory, name: bytes, *, anew: bool) -> None:
        fd = self._directories.fd(parent)
        path = _join(parent, name)
        try:
            self._directories.make(parent, name)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                self._remove(parent, name)
                # What was here hid the directory below it, and so must this.
                self._directories.hide(self._directories.make(parent, name))
            elif anew:
                forget_xattrs(self._directories.fd(self._directories.enter(parent, name, fresh=False)))
        self._directories.describe(
            path, Attributes(entry.mode, entry.uid, entry.gid, entry.atime, entry.mtime, entry.xattrs)
        )

    def _hardlink(self, entry: Entry, parent: Directory, name: bytes) -> None:
        source = _clean(entry.link)
        source_parent_path, _, source_name = source.rpartition(b"/")
        if not source_name:
            raise Unacceptable(f"{shown(entry.name)}: a hard link to the root")
        source_parent = self._directories.resolve(source_parent_path)
        status = self._own_or_copied(entry, source_parent, source_name)
        if stat.S_ISDIR(status.st_mode):
            raise Unacceptable(f"{shown(entry.name)}: a hard link to a directory ({shown(entry.link)})")
        if (source_parent.path, source_name) != (parent.path, name):

            def link(fd: int) -> None:
                source_fd = os.dup(self._directories.fd(source_parent))
                try:
                    os.link(
                        source_name, name, src_dir_fd=source_fd, dst_dir_fd=self._directories.fd(parent),
                        follow_symlinks=False,
                    )  # fmt: skip
                finally:
                    os.close(source_fd)

            self._make(parent, name, link)
        self._attributes(entry, parent, name, mode=not stat.S_ISLNK(status.st_mode))

    @staticmethod
    def _node(entry: Entry, name: bytes, fd: int) -> None:
        os.mknod(name, _DEVICES[entry.kind] | entry.mode & 0o777, os.makedev(entry.major, entry.minor), dir_fd=fd)

    def _white_out(self, parent: Directory, name: bytes) -> None:
        """A whiteout hides what layers below have, and nothing of its own layer."""
        if not self._layered and self._filled is None:
            return
        if name == _OPAQUE:
            self._hide(parent)
            return
        hidden = name[len(_WHITEOUT) :]
        if hidden.startswith(_WHITEOUT):
            return  # .wh..wh.*: aufs' own files
        if hidden in (b"", b".", b".."):
            raise Unacceptable(f"{shown(name)}: a whiteout of nothing")
        if self._filled is not None:
            if self._layered and overlay.hides(hidden, self._directories.fd(parent)):
                return
            if self._filled.take_away(_join(parent, hidden), hidden, self._directories.fd(parent)):
                self._directories.forget()
            if not self._layered or overlay.look_below(parent.below, hidden) is None:
                return
        fd = self._directories.fd(parent)
        try:
            overlay.whiteout(hidden, fd)
            if parent.inherits:
                os.chown(hidden, 0, 0, dir_fd=fd, follow_symlinks=False)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(hidden, dir_fd=fd, follow_symlinks=False).st_mode):
                self._directories.hide(self._directories.enter(parent, hidden, fresh=False))

    def _hide(self, parent: Directory) -> None:
        if self._filled is not None:
            self._filled.clear(parent.path, self._directories.fd(parent))
            self._directories.forget()
        self._directories.hide(parent)

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _make(self, parent: Directory, name: bytes, make: Callable[[int], None]) -> None:
        try:
            make(self._directories.fd(parent))
        except FileExistsError:
            self._remove(parent, name)
            make(self._directories.fd(parent))

    def _attributes(self, entry: Entry, parent: Directory, name: bytes, *, mode: bool = True) -> None:
        fd = self._directories.fd(parent)
        os.chown(name, entry.uid, entry.gid, dir_fd=fd, follow_symlinks=False)
        if entry.xattrs:
            set_xattrs(b"/proc/self/fd/%d/%s" % (fd, name), entry.xattrs, entry.name)
        if mode:
            _chmod(name, entry.mode, fd)
        os.utime(name, ns=(entry.atime, entry.mtime), dir_fd=fd, follow_symlinks=False)

    def _remove(self, parent: Directory, name: bytes) -> None:
        """Takes away what an earlier entry made: it is replaced."""
        fd = self._directories.fd(parent)
        kind = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        disk.remove(name, fd)
        if stat.S_ISDIR(kind) or stat.S_ISLNK(kind):
            self._directories.forget()

    def _own_or_copied(self, entry: Entry, parent: Directory, name: bytes) -> os.stat_result:
        """A file of this layer; one of a layer below is copied up first, as overlayfs would do."""
        fd = self._directories.fd(parent)
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            if parent.uncertain:
                raise NeedsParent from None
            below = overlay.look_below(parent.below, name)
            if below is None:
                raise Unacceptable(
                    f"{shown(entry.name)}: a hard link to {shown(entry.link)}, which isn't there"
                ) from None
            _copy_up(below, fd, name)
            return below.status
        if self._layered and overlay.is_whiteout(status):
            raise Unacceptable(f"{shown(entry.name)}: a hard link to {shown(entry.link)}, which is removed")
        return status


def _copy_up(below: overlay.Below, fd: int, name: bytes) -> None:
    was, source = below.status, below.paths[0]
    if stat.S_ISDIR(was.st_mode):
        return
    if stat.S_ISLNK(was.st_mode):
        os.symlink(os.readlink(source), name, dir_fd=fd)  # noqa: PTH115 (bytes)
    elif stat.S_ISREG(was.st_mode):
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=fd)
        with os.fdopen(target, "wb", buffering=0), open(source, "rb", buffering=0) as file:  # noqa: PTH123 (bytes)
            while os.sendfile(target, file.fileno(), None, 1 << 30):
                pass
    else:
        os.mknod(name, was.st_mode, was.st_rdev, dir_fd=fd)
    os.chown(name, was.st_uid, was.st_gid, dir_fd=fd, follow_symlinks=False)
    set_xattrs(b"/proc/self/fd/%d/%s" % (fd, name), read_xattrs(source), name)
    if not stat.S_ISLNK(was.st_mode):
        _chmod(name, stat.S_IMODE(was.st_mode), fd)
    os.utime(name, ns=(was.st_atime_ns, was.st_mtime_ns), dir_fd=fd, follow_symlinks=False)


def _chmod(name: bytes, mode: int, dir_fd: int) -> None:
    """chmod(2) that follows no link: until Linux 6.6 there is none, so it goes by a descriptor of the very file."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        was = os.fstat(fd).st_mode
        if stat.S_ISLNK(was):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if stat.S_IMODE(was) != mode:
            os.chmod(b"/proc/self/fd/%d" % fd, mode)  # noqa: PTH101 (bytes)
    finally:
        os.close(fd)


def _clean(name: bytes) -> bytes:
    """A name of an archive without `.`, `..` and slashes too many; `..` stops at the root."""
    if b"//" not in name and b"." not in name and name[:1] != b"/" and name[-1:] != b"/":
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def _join(parent: Directory, name: bytes) -> bytes:
    return parent.path + b"/" + name if parent.path else name
