"""Network namespaces that last: each is a bind mount of nsfs on a file, as `ip netns` makes them (ip-netns(8)).

A process's threads may be in different network namespaces. So whatever has to happen in another one is done by a
thread that lives only for that: the service as a whole never leaves its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute

from shoal_network import directory
from shoal_network.syscalls import CLONE_NEWNET, MS_BIND, enter_network, mount, unmount, unshare_network

NS_GET_NSTYPE = 0xB703

DEFAULT_DIRECTORY = Path("/run/netns")
"""Where `ip netns` looks."""

T = TypeVar("T")


def _in_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again by who waits for this thread)
            errors.append(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def run_in(path: Path | None, work: Callable[[], T]) -> T:
    """What `work` returns, run in the network namespace at `path`; None is this process's own. Blocks."""
    if path is None:
        return _in_thread(work)  # pyroute2 runs an event loop of its own, which a thread with a running one refuses

    def enter() -> T:
        enter_network(path)
        return work()

    return _in_thread(enter)


@contextmanager
def exclusive(path: Path | None) -> Iterator[None]:
    """Holds the network namespace at `path` (None: this process's own) against every other shoal of this host.

    Nodes that share a namespace share no database and no directory, so the lock is on the namespace's own inode. It
    dies with its holder. Blocks.
    """
    fd = os.open(path or "/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def identity(path: Path) -> tuple[int, int] | None:
    """Which network namespace is at `path` (device and inode of nsfs), or None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if fcntl.ioctl(fd, NS_GET_NSTYPE) != CLONE_NEWNET:
            return None
        found = os.fstat(fd)
    except OSError as error:
        if error.errno == errno.ENOTTY:  # a plain file: the mount on it is gone
            return None
        raise
    finally:
        os.close(fd)
    return found.st_dev, found.st_ino


def create(path: Path) -> None:
    """Makes a network namespace with loopback up, and mounts it on `path`. What a killed attempt left is replaced."""
    _drop(path)

    def make() -> None:
        unshare_network(str(path))
        with IPRoute() as route:
            route.link("set", index=1, state="up")  # loopback is always link 1
        mount("/proc/thread-self/ns/net", path, MS_BIND)

    with directory.shared(path.parent):
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    try:
        _in_thread(make)
    except BaseException:
        remove(path)
        raise


def remove(path: Path) -> None:
    """Unmounts and removes the file; the namespace goes with the last process in it. Nothing there is no error."""
    _drop(path)
    directory.tidy(path.parent)


def _drop(path: Path) -> None:
    unmount(path)
    path.unlink(missing_ok=True)


def names(where: Path) -> list[str]:
    """The names of what is mounted, or was to be, in the directory `where`."""
    try:
        return [entry.name for entry in where.iterdir()]
    except FileNotFoundError:
        return []
