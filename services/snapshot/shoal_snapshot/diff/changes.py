"""What differs between two trees, in the order in which a layer says it.

Both are walked together, directory by directory and by sorted names. What only the lower tree has becomes a whiteout;
a directory that was made anew is told by whiteouts of what it held, and never as opaque, so that every way to the same
tree makes the same layer. Directories on the way to a change are told, too. When one name of a hard-linked file is
told, all its names are.

With overlayfs, the directory of what was changed tells where to look (`hint`): what isn't in it is as it was.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from shoal_snapshot.apply import overlay
from shoal_snapshot.apply.errors import ApplyError, Unacceptable, shown
from shoal_snapshot.diff.archive import Archive
from shoal_snapshot.walking import Descent, names

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
"""What fuse-overlayfs leaves in a directory that it has made opaque by overlayfs's attribute, too."""
_KEPT = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")
_REDIRECTS = ("trusted.overlay.redirect", "user.overlay.redirect")
_SECOND = 1_000_000_000
_PIECE = 1 << 20
Owner = Callable[[os.stat_result], tuple[int, int]]
Identity = tuple[int, int]


def owner_on_disk(status: os.stat_result) -> tuple[int, int]:
    """A file's owner as it stands."""
    return status.st_uid, status.st_gid


@dataclass
class _Level:
    """A directory on the way down."""

    path: bytes
    status: os.stat_result
    xattrs: dict[str, bytes]
    told: bool
    """It has an entry in the layer, or needs none."""
    lower: bool
    """The lower tree has it, too."""
    hint: bool
    """The directory of changes has it, and all that was changed below it."""
    todo: list[bytes] = field(default_factory=list)


class Changes:
    """Writes what makes `upper` of `lower` (None: of nothing) into an archive. They are open directories."""

    def __init__(
        self, archive: Archive, upper: int, lower: int | None, hint: int | None = None, owner: Owner = owner_on_disk
    ) -> None:
        self._archive, self._owner = archive, owner
        self._roots = (upper, lower, hint)
        self._levels: list[_Level] = []
        self._told: dict[Identity, bytes] = {}
        """The first name in the layer of each file that has several."""
        self._unchanged: dict[Identity, list[bytes]] = {}
        """Names of files that have several, none of which is in the layer."""

    def run(self) -> None:
        """Walks both trees to their end."""
        upper, lower, hint = self._roots
        with ExitStack() as stack:
            self._upper = stack.enter_context(Descent(upper))
            self._lower = stack.enter_context(Descent(lower if lower is not None else upper))
            self._hint = stack.enter_context(Descent(hint if hint is not None else upper))
            status = os.fstat(upper)
            self._enter(_Level(b"", status, {}, told=True, lower=lower is not None, hint=hint is not None))
            while self._levels:
                level = self._levels[-1]
                if level.todo:
                    self._visit(level, level.todo.pop())
                else:
                    self._leave()

    # --------------------------------------------------------------------------------------------------------- walking

    def _enter(self, level: _Level) -> None:
        if level.hint and (overlay.is_opaque(self._hint.fd) or _is_redirected(self._hint.fd)):
            level.hint = False  # what is below it here isn't what the lower tree has at this path
        if level.hint:
            there = set(names(self._hint.fd))
        else:
            there = set(names(self._upper.fd))
            if level.lower:
                there.update(names(self._lower.fd))
        level.todo = sorted(there, reverse=True)
        self._levels.append(level)

    def _leave(self) -> None:
        level = self._levels.pop()
        if not self._levels:
            return
        self._upper.up()
        if level.lower:
            self._lower.up()
        if self._levels[-1].hint:
            self._hint.up()

    def _visit(self, level: _Level, name: bytes) -> None:
        if name == _OPAQUE:
            return
        path = level.path + b"/" + name if level.path else name
        upper = _stat(name, self._upper.fd)
        lower = _stat(name, self._lower.fd) if level.lower else None
        if upper is not None and stat.S_ISSOCK(upper.st_mode):
            if lower is not None and stat.S_ISSOCK(lower.st_mode):
                return
            upper = None  # an archive can't hold one
        if upper is None:
            if lower is not None:
                self._tell_above()
                self._archive.remove(path)
            return
        if name.startswith(_WHITEOUT):
            raise Unacceptable(f"{shown(path)}: a layer can't hold a file of that name", hint="rename or remove it")
        if stat.S_ISDIR(upper.st_mode):
            self._directory(level, name, path, upper, lower)
        elif lower is not None and self._same(name, upper, lower):
            self._keep(path, upper)
        else:
            self._file(name, path, upper)

    def _directory(
        self, level: _Level, name: bytes, path: bytes, upper: os.stat_result, lower: os.stat_result | None
    ) -> None:
        below = lower is not None and stat.S_ISDIR(lower.st_mode)
        xattrs = _xattrs(self._upper.fd, name)
        same = below and lower is not None and self._same_attributes(name, upper, lower, xattrs)
        inner = _Level(path, upper, xattrs, told=False, lower=below, hint=level.hint)
        if not same:
            self._tell_above()
            self._tell(inner)
        self._upper.down(name)
        if below:
            self._lower.down(name)
        if level.hint:
            self._hint.down(name)
        self._enter(inner)

    def _tell_above(self) -> None:
        """Directories on the way here are in the layer before what is in them."""
        for level in self._levels:
            if not level.told:
                self._tell(level)

    def _tell(self, level: _Level) -> None:
        self._archive.add(level.path, level.status, self._owner(level.status), xattrs=level.xattrs)
        level.told = True

    # ----------------------------------------------------------------------------------------------------------- files

    def _keep(self, path: bytes, status: os.stat_result) -> None:
        """A file that is as it was: one of its other names may not be."""
        if status.st_nlink < 2:
            return
        identity = (status.st_dev, status.st_ino)
        first = self._told.get(identity)
        if first is None:
            self._unchanged.setdefault(identity, []).append(path)
        else:
            self._tell_above()
            self._archive.add(path, status, self._owner(status), link=first, hardlink=True)

    def _file(self, name: bytes, path: bytes, status: os.stat_result) -> None:
        self._tell_above()
        identity = (status.st_dev, status.st_ino)
        several = status.st_nlink > 1
        first = self._told.get(identity) if several else None
        if first is not None:
            self._archive.add(path, status, self._owner(status), link=first, hardlink=True)
            return
        if stat.S_ISREG(status.st_mode):
            self._regular(name, path)
        else:
            link = os.readlink(name, dir_fd=self._upper.fd) if stat.S_ISLNK(status.st_mode) else b""
            xattrs = _xattrs(self._upper.fd, name)
            self._archive.add(path, status, self._owner(status), link=link, xattrs=xattrs)
        if several:
            self._told[identity] = path
            for other in self._unchanged.pop(identity, []):
                self._archive.add(other, status, self._owner(status), link=path, hardlink=True)

    def _regular(self, name: bytes, path: bytes) -> None:
        fd = _open(name, self._upper.fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _changing(path)
            self._archive.add(path, status, self._owner(status), xattrs=_xattrs(self._upper.fd, name))
            at, end = 0, status.st_size
            while at < end:
                data = min(end, _next_data(fd, at, end))
                if data > at:
                    self._archive.zeros(data - at)
                at = data
                hole = min(end, _next_hole(fd, at, end))
                while at < hole:
                    piece = os.pread(fd, min(_PIECE, hole - at), at)
                    if not piece:
                        raise _changing(path)
                    self._archive.data(piece)
                    at += len(piece)
        finally:
            os.close(fd)

    # ------------------------------------------------------------------------------------------------------- comparing

    def _same(self, name: bytes, upper: os.stat_result, lower: os.stat_result) -> bool:
        if _untouched(upper, lower):
            return True
        if stat.S_IFMT(upper.st_mode) != stat.S_IFMT(lower.st_mode) or upper.st_size != lower.st_size:
            return False
        if not self._same_attributes(name, upper, lower, _xattrs(self._upper.fd, name)):
            return False
        if stat.S_ISLNK(upper.st_mode):
            return os.readlink(name, dir_fd=self._upper.fd) == os.readlink(name, dir_fd=self._lower.fd)
        if stat.S_ISREG(upper.st_mode) and upper.st_mtime_ns % _SECOND == 0:
            # A whole second: somebody has set it (an archive, touch), so it proves nothing.
            return self._same_bytes(name)
        return True

    def _same_attributes(
        self, name: bytes, upper: os.stat_result, lower: os.stat_result, xattrs: dict[str, bytes]
    ) -> bool:
        return (
            upper.st_mode == lower.st_mode
            and self._owner(upper) == owner_on_disk(lower)
            and upper.st_rdev == lower.st_rdev
            and upper.st_mtime_ns == lower.st_mtime_ns
            and xattrs == _xattrs(self._lower.fd, name)
        )

    def _same_bytes(self, name: bytes) -> bool:
        with ExitStack() as stack:
            upper, lower = _open(name, self._upper.fd), -1
            stack.callback(os.close, upper)
            lower = _open(name, self._lower.fd)
            stack.callback(os.close, lower)
            while True:
                piece = os.read(upper, _PIECE)
                other = b""
                while len(other) < len(piece) and (more := os.read(lower, len(piece) - len(other))):
                    other += more
                if piece != other:
                    return False
                if not piece:
                    return not os.read(lower, 1)


def _untouched(upper: os.stat_result, lower: os.stat_result) -> bool:
    """Both are the same inode, or (btrfs) one is what the other's snapshot has at it."""
    return (
        upper.st_ino == lower.st_ino
        and upper.st_ctime_ns == lower.st_ctime_ns
        and upper.st_mtime_ns == lower.st_mtime_ns
        and upper.st_size == lower.st_size
        and upper.st_mode == lower.st_mode
    )


def _stat(name: bytes, fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _open(name: bytes, dir_fd: int) -> int:
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)


def _xattrs(dir_fd: int, name: bytes) -> dict[str, bytes]:
    """A file's extended attributes that belong into a layer: capabilities, ACLs, and users' own."""
    path = b"/proc/self/fd/%d/%s" % (dir_fd, name)
    found: dict[str, bytes] = {}
    try:
        for key in os.listxattr(path, follow_symlinks=False):
            if key in _KEPT or (key.startswith("user.") and not key.startswith(overlay.PRIVATE)):
                with suppress(OSError):  # it has gone
                    found[key] = os.getxattr(path, key, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
    return found


def _is_redirected(fd: int) -> bool:
    return any(key in _REDIRECTS for key in os.listxattr(fd))


def _next_data(fd: int, at: int, end: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else at  # nothing but a hole follows; a file system without holes


def _next_hole(fd: int, at: int, end: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_HOLE)
    except OSError:
        return end


def _changing(path: bytes) -> ApplyError:
    return ApplyError(
        f"{shown(path)}: changed while it was read", hint="pause or stop what writes to it", code="ABORTED"
    )
