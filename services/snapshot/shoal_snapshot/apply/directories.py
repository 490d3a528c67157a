"""The directories a layer is extracted into: every path of an archive becomes a directory inside the root, or an error.

A path is walked one component at a time, from a file descriptor of the root on, and no component is followed by the
kernel: a link is read here and walked in the same way, with `..` never going above the root. So neither an absolute
name nor `..` nor a link, whether this archive made it, an earlier layer did, or the one before in the chain, leads out.

A path goes through the whole chain, as it would if it were mounted: what the layer itself doesn't hold is looked up in
the layers below. A directory that is only implied takes that one's attributes, or is root's with mode 0755.

Without its layers below (`detached`) an archive is extracted as if they held nothing but directories; the directories
it implies are noted, and `attach` gives them their attributes later, or finds that it went wrong.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shoal_snapshot.apply import overlay
from shoal_snapshot.apply.errors import NeedsParent, Unacceptable, shown
from shoal_snapshot.syscalls import open_in_root

MAX_DEPTH = 1000
MAX_PATH_BYTES = 4000  # below PATH_MAX: directories are named by their paths in the root
_MAX_LINKS = 40  # the kernel's own limit (path_resolution(7))
_MAX_OPEN = 400
_MAX_KNOWN_BYTES = 8 << 20
_MAX_PENDING_BYTES = 8 << 20
_MAX_IMPLIED_BYTES = 2 << 20
_ENTRY_BYTES = 250
"""What one more entry of a dictionary here takes, beside its path."""
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Attributes:
    """What a directory gets when everything in it has been made: until then it is plain, and open to us alone."""

    mode: int
    uid: int
    gid: int
    atime: int
    mtime: int
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Directory:
    """A directory of the layer: its path in the root, without links, and the same directory in the layers below."""

    path: bytes
    below: tuple[bytes, ...]
    inherits: bool
    """What is made in it gets its group (setgid): it was there before, with that mode."""
    uncertain: bool = False
    """What the layers below have in it shows through, but isn't known: the extraction is a detached one."""


class Directories:
    """The directories of one extraction. `lowers` are the roots of the layers below, the highest first.

    What is remembered of them is bounded, however many there are.
    """

    def __init__(self, root: str, lowers: Sequence[str] = (), *, detached: bool = False) -> None:
        self._root_fd = os.open(root, _FLAGS)
        self._lowers = tuple(os.fsencode(lower) for lower in lowers)
        opaque = overlay.is_opaque(self._root_fd)
        below = () if opaque else self._lowers
        inherits = bool(os.fstat(self._root_fd).st_mode & stat.S_ISGID)
        self.root = Directory(b"", below, inherits, uncertain=detached and not opaque)
        self._known: dict[bytes, Directory] = {b"": self.root}
        """By their paths, without links."""
        self._aliases: dict[bytes, Directory] = {b"": self.root}
        """By the names they were asked for."""
        self._through: set[bytes] = set()
        """Where links of the layers below have led on the way to those."""
        self._known_bytes = 0
        self._fds: OrderedDict[bytes, int] = OrderedDict()
        self._pending: dict[bytes, Attributes] = {}
        """What directories get at the end, by path; what is no longer a directory then gets nothing."""
        self._pending_bytes = 0
        self._settled = False
        """Some directories have had their attributes already: whoever changes one of them has to restore its time."""
        self.implied: dict[bytes, bool] = {}
        """Directories that a detached extraction made where the layers below may have something; and whether they take
        that one's attributes: no longer, once the archive has told its own."""
        self._implied_bytes = 0

    def close(self) -> None:
        """Closes every file descriptor."""
        self.forget()
        os.close(self._root_fd)

    def fd(self, directory: Directory) -> int:
        """A file descriptor of it, good until the next call of any method here for another directory."""
        path = directory.path
        if not path:
            return self._root_fd
        fd = self._fds.get(path)
        if fd is not None:
            self._fds.move_to_end(path)
            return fd
        fd = open_in_root(self._root_fd, path, _FLAGS)
        self._remember(path, fd)
        return fd

    def resolve(self, path: bytes) -> Directory:
        """The directory at `path` (with `/` between, none at its ends), made with all its parents where it isn't there.

        FAILED_PRECONDITION: something else is in the way, or links go round in circles.
        """
        found = self._aliases.get(path)
        if found is not None:
            return found
        if path.count(b"/") > MAX_DEPTH:
            raise Unacceptable(f"{shown(path)}: more than {MAX_DEPTH} directories deep")
        parent, slash, name = path.rpartition(b"/")
        near = self._aliases.get(parent) if slash else None
        stack = self._ancestors(near or self.root)
        todo = [name] if near else path.split(b"/")[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            step = self._step(stack[-1], part)
            if isinstance(step, Directory):
                stack.append(step)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise Unacceptable(f"{shown(path)}: too many symbolic links")
            if step.startswith(b"/"):
                del stack[1:]
            todo.extend(step.split(b"/")[::-1])
            if len(todo) > 4 * MAX_DEPTH:
                raise Unacceptable(f"{shown(path)}: its links lead too deep")
        if len(stack) > MAX_DEPTH:
            raise Unacceptable(f"{shown(path)}: more than {MAX_DEPTH} directories deep")
        self._aliases[path] = stack[-1]
        self._known_bytes += len(path) + _ENTRY_BYTES
        if self._known_bytes > _MAX_KNOWN_BYTES:
            self.forget()
        return stack[-1]

    def enter(self, parent: Directory, name: bytes, *, fresh: bool) -> Directory:
        """The directory `name` of `parent`, which is there; `fresh` when this layer just made it anew."""
        path = parent.path + b"/" + name if parent.path else name
        known = self._known.get(path)
        if known is not None:
            return known
        if len(path) > MAX_PATH_BYTES:
            raise Unacceptable(f"{shown(path)}: a path of {len(path)} bytes, at most {MAX_PATH_BYTES} are allowed")
        if self._known_bytes > _MAX_KNOWN_BYTES:
            self.forget()
        fd = os.open(name, _FLAGS, dir_fd=self.fd(parent))
        self._remember(path, fd)
        inherits = opaque = False
        if not fresh:
            was = os.fstat(fd)
            inherits = bool(was.st_mode & stat.S_ISGID)
            opaque = bool(parent.below or parent.uncertain) and overlay.is_opaque(fd)
            if self._settled and path not in self._pending:
                self._expect(path, _attributes_of(was))
        below = () if opaque else self._below(parent, name)
        directory = Directory(path, below, inherits, uncertain=parent.uncertain and not opaque)
        self._known[path] = directory
        self._known_bytes += len(path) + _ENTRY_BYTES
        return directory

    def make(self, parent: Directory, name: bytes) -> Directory:
        """Makes a plain directory in `parent`: root's, with mode 0755, whatever it would inherit. FileExistsError."""
        os.mkdir(name, 0o755, dir_fd=self.fd(parent))
        directory = self.enter(parent, name, fresh=True)
        if parent.inherits:
            os.fchown(self.fd(directory), 0, 0)
            os.fchmod(self.fd(directory), 0o755)
        return directory

    def describe(self, path: bytes, attributes: Attributes) -> None:
        """Says what a directory gets at the end: the archive has told."""
        if path in self.implied:
            self.implied[path] = False
        self._expect(path, attributes)

    def hide(self, directory: Directory) -> None:
        """Makes a directory opaque: nothing below shows through it."""
        if not (self._lowers or self.root.uncertain or directory.uncertain):
            return
        if not directory.path:
            if directory.uncertain:
                raise NeedsParent
            for name in overlay.hide_names(self._lowers, self._root_fd):
                self.hide(self.enter(self.root, name, fresh=False))
        overlay.make_opaque(self.fd(directory))
        self.forget()  # what is below it has changed for all that lies in it
        directory.below, directory.uncertain = (), False

    def forget(self) -> None:
        """Forgets what is known of paths: a directory or a link has been replaced."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._known = {b"": self.root}
        self._aliases = {b"": self.root}
        self._through.clear()
        self._known_bytes = 0

    def cover(self, parent: Directory, name: bytes) -> None:
        """Something is about to be made under that name: a link of the layers below leads nowhere from now on."""
        if self._through and (parent.path + b"/" + name if parent.path else name) in self._through:
            self.forget()

    def settle(self) -> None:
        """Gives the directories their attributes if there are too many to be remembered. Between two entries only."""
        if self._pending_bytes > _MAX_PENDING_BYTES:
            self.finish()
            self.forget()  # whoever is entered again is looked at again
            self._settled = True

    def finish(self) -> None:
        """Gives the directories their attributes, the deepest first."""
        for path in sorted(self._pending, key=lambda p: p.count(b"/"), reverse=True):
            set_attributes(self._root_fd, path, self._pending[path])
        self._pending.clear()
        self._pending_bytes = 0

    # ---------------------------------------------------------------------------------------------------------- walking

    def _step(self, parent: Directory, name: bytes) -> Directory | bytes:
        """One component: the directory it is, or the target of the link it is."""
        path = parent.path + b"/" + name if parent.path else name
        known = self._known.get(path)
        if known is not None:
            return known
        fd = self.fd(parent)
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return self._imply(parent, name, path)
        if stat.S_ISDIR(status.st_mode):
            return self.enter(parent, name, fresh=False)
        if stat.S_ISLNK(status.st_mode):
            return os.readlink(name, dir_fd=fd)
        if overlay.is_whiteout(status):
            os.unlink(name, dir_fd=fd)
            directory = self.make(parent, name)
            self.hide(directory)
            return directory
        raise Unacceptable(f"{shown(path)}: is in the way of a directory")

    def _imply(self, parent: Directory, name: bytes, path: bytes) -> Directory | bytes:
        below = overlay.look_below(parent.below, name)
        if below is not None and stat.S_ISLNK(below.status.st_mode):
            self._through.add(path)
            self._known_bytes += len(path) + _ENTRY_BYTES
            return os.readlink(below.paths[0])  # noqa: PTH115 (bytes)
        if self._pending.pop(path, None) is not None:
            self._pending_bytes -= len(path) + _ENTRY_BYTES  # it was another's, which is gone
        if parent.uncertain:
            self._imply_uncertain(path)
        elif path in self.implied:
            self.implied[path] = False
        if below is not None and stat.S_ISDIR(below.status.st_mode):
            self._expect(path, _attributes_of(below.status, read_xattrs(below.paths[0])))
        return self.make(parent, name)

    def _imply_uncertain(self, path: bytes) -> None:
        if path not in self.implied:
            self._implied_bytes += len(path) + _ENTRY_BYTES
            if self._implied_bytes > _MAX_IMPLIED_BYTES:
                raise NeedsParent
        self.implied[path] = True

    def _expect(self, path: bytes, attributes: Attributes) -> None:
        if path not in self._pending:
            self._pending_bytes += len(path) + _ENTRY_BYTES
        self._pending_bytes += sum(len(key) + len(value) + 100 for key, value in attributes.xattrs.items())
        self._pending[path] = attributes

    def _below(self, parent: Directory, name: bytes) -> tuple[bytes, ...]:
        if not parent.below:
            return ()
        below = overlay.look_below(parent.below, name)
        return below.paths if below is not None and stat.S_ISDIR(below.status.st_mode) else ()

    def _ancestors(self, directory: Directory) -> list[Directory]:
        """A directory and all those it lies in, from the root on."""
        stack, at = [self.root], -1
        path = directory.path
        while path and (at := path.find(b"/", at + 1)) >= 0:
            stack.append(self._known.get(path[:at]) or self._reenter(stack[-1], path[:at]))
        return [*stack, directory] if path else stack

    def _reenter(self, parent: Directory, path: bytes) -> Directory:
        return self.enter(parent, path.rpartition(b"/")[2], fresh=False)

    def _remember(self, path: bytes, fd: int) -> None:
        while len(self._fds) >= _MAX_OPEN:
            os.close(self._fds.popitem(last=False)[1])
        stale = self._fds.pop(path, None)
        if stale is not None:
            os.close(stale)
        self._fds[path] = fd


def set_attributes(root_fd: int, path: bytes, attributes: Attributes) -> bool:
    """Gives the directory at `path` its attributes; says whether there is one."""
    try:
        fd = open_in_root(root_fd, path, _FLAGS)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False  # it has been removed, or replaced
        raise
    try:
        os.fchown(fd, attributes.uid, attributes.gid)
        set_xattrs(fd, attributes.xattrs, path)
        os.fchmod(fd, attributes.mode)
        os.utime(fd, ns=(attributes.atime, attributes.mtime))
    finally:
        os.close(fd)
    return True


def attach(root: str, lowers: Sequence[str], implied: dict[bytes, bool]) -> None:
    """Gives the directories that a detached extraction implied what the layers below say of them.

    NeedsParent: one of them is a link there, so that what was put into it belongs elsewhere.
    """
    root_fd = os.open(root, _FLAGS)
    try:
        below = _Below(lowers)
        taken: list[tuple[bytes, Attributes]] = []
        for path in sorted(implied, key=lambda p: p.count(b"/")):
            parent, _, name = path.rpartition(b"/")
            found = overlay.look_below(below.of(parent), name)
            if found is None:
                continue
            if stat.S_ISLNK(found.status.st_mode):
                raise NeedsParent
            if stat.S_ISDIR(found.status.st_mode) and implied[path]:
                taken.append((path, _attributes_of(found.status, read_xattrs(found.paths[0]))))
        for path, attributes in reversed(taken):
            set_attributes(root_fd, path, attributes)
    finally:
        os.close(root_fd)


class _Below:
    """The directories that a path is merged of in the layers below; none where it isn't a directory there."""

    def __init__(self, lowers: Sequence[str]) -> None:
        self._root = tuple(os.fsencode(lower) for lower in lowers)
        self._known: dict[bytes, tuple[bytes, ...]] = {}
        self._known_bytes = 0

    def of(self, path: bytes) -> tuple[bytes, ...]:
        known, at = self._root, 0
        while at < len(path) and known:
            end = path.find(b"/", at)
            end = end if end >= 0 else len(path)
            prefix = path[:end]
            merged = self._known.get(prefix)
            if merged is None:
                found = overlay.look_below(known, path[at:end])
                merged = found.paths if found is not None and stat.S_ISDIR(found.status.st_mode) else ()
                if self._known_bytes > _MAX_KNOWN_BYTES:
                    self._known.clear()
                    self._known_bytes = 0
                self._known[prefix] = merged
                self._known_bytes += len(prefix) + _ENTRY_BYTES + sum(map(len, merged))
            known, at = merged, end + 1
        return known


def _attributes_of(was: os.stat_result, xattrs: dict[str, bytes] | None = None) -> Attributes:
    return Attributes(stat.S_IMODE(was.st_mode), was.st_uid, was.st_gid, was.st_atime_ns, was.st_mtime_ns, xattrs or {})


def set_xattrs(target: int | bytes, xattrs: dict[str, bytes], name: bytes) -> None:
    """Sets extended attributes, without following a link.

    Those a file system doesn't have are passed over, as containerd does, and so are overlayfs's own: they are marks of
    the storage, not of the layer. Only files and directories can have `user.*` (xattr(7)): by their descriptor; a link
    or a device, which are named by path, go without.
    """
    for key, value in xattrs.items():
        if key.startswith(overlay.PRIVATE):
            continue
        try:
            os.setxattr(target, key, value, follow_symlinks=isinstance(target, int))
        except OSError as error:
            special = error.errno == errno.EPERM and key.startswith("user.") and not isinstance(target, int)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if error.errno != errno.ENOTSUP and not special:
                raise Unacceptable(f"{shown(name)}: attribute {key}: {error.strerror}") from None


def read_xattrs(path: bytes) -> dict[str, bytes]:
    """The extended attributes of a file that belong to it and not to overlayfs."""
    found: dict[str, bytes] = {}
    with suppress(OSError):  # a file system without them has none
        for key in os.listxattr(path, follow_symlinks=False):
            if not key.startswith(("trusted.", *overlay.PRIVATE)):
                found[key] = os.getxattr(path, key, follow_symlinks=False)
    return found
