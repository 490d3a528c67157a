"""The directory that network namespaces are mounted in: shared among mount namespaces, and gone again with the last.

It is `ip netns`'s own (/run/netns), so its rules are followed: a mount point with shared propagation, made under a
lock on the directory. What shoal made of it is marked on the directory itself, in an extended attribute, so that any
node of this host takes it away again, whichever of them made it, and none takes away what somebody else made.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_network.syscalls import MS_BIND, MS_REC, MS_SHARED, mount, rename_new, unmount

MARK = "trusted.shoal"
MADE, MOUNTED = b"directory", b"mount"
_NO_MARK = (errno.ENODATA, errno.ENOTSUP, errno.ENOENT)


@contextmanager
def shared(directory: Path) -> Iterator[None]:
    """`directory` as a mount point with shared propagation, made if need be; nobody tidies it within the block.

    Without it, a namespace that is unmounted here lives on in every mount namespace copied from this one.
    """
    with _locked(directory, make=True):
        try:
            mount("", directory, MS_SHARED | MS_REC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if _mark_of(directory) is None:
                _mark(directory, MOUNTED)
            mount(str(directory), directory, MS_BIND | MS_REC)
            mount("", directory, MS_SHARED | MS_REC)
        yield


def tidy(directory: Path) -> None:
    """Undoes what `shared` did, once nothing is left in it."""
    with suppress(FileNotFoundError):
        if _mark_of(directory) is None or any(directory.iterdir()):
            return
        with _locked(directory, make=False):
            mark = _mark_of(directory)
            if mark is None or any(directory.iterdir()):
                return
            unmount(directory)
            if mark == MADE:
                try:
                    directory.rmdir()
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:  # `ip netns add` has come between
                        raise
            else:
                os.removexattr(directory, MARK)


@contextmanager
def _locked(directory: Path, *, make: bool) -> Iterator[None]:
    while True:
        if make:
            _make(directory)
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not make:
                raise
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is(directory, fd):
                yield
                return
        finally:
            os.close(fd)  # or it was tidied away while we waited for it: the next one is another directory


def _make(directory: Path) -> None:
    """Makes it with its mark, in one step: one that is killed leaves none without."""
    if directory.exists():
        return
    beside = directory.with_name(f".{directory.name}.shoal")
    beside.mkdir(mode=0o755, parents=True, exist_ok=True)
    _mark(beside, MADE)
    with suppress(FileNotFoundError):  # another one, at the same, has been faster
        try:
            rename_new(beside, directory)
        except FileExistsError:
            beside.rmdir()


def _is(directory: Path, fd: int) -> bool:
    try:
        return os.path.samestat(directory.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _mark_of(directory: Path) -> bytes | None:
    try:
        return os.getxattr(directory, MARK)
    except OSError as error:
        if error.errno in _NO_MARK:
            return None
        raise


def _mark(directory: Path, mark: bytes) -> None:
    try:
        os.setxattr(directory, MARK, mark)
    except OSError as error:
        if error.errno not in _NO_MARK:  # a file system without attributes: the directory stays, as `ip netns`'s does
            raise
