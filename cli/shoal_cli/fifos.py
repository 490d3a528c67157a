"""Where the FIFOs of processes are: `<state>/fifo/<namespace>/<container>/<name>/{stdin,stdout,stderr}`.

A directory is locked (flock(2)) by the one client that is attached. That of a container's first process lasts as long
as the container, for who attaches later or again; that of an exec as long as the exec. What a client that was killed
left behind is removed by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.errors import FailedPrecondition, from_exception
from shoal_bus.types import Stdio

_FIRST, _EXEC = "first-", "exec-"


class Place:
    """A directory of FIFOs that were made for a process. It goes at the end of the block, unless `kept`."""

    def __init__(self, path: Path, stdio: Stdio) -> None:
        self.path, self.stdio = path, stdio
        self.kept = False


class Fifos:
    """Those of one namespace of the node on this machine."""

    def __init__(self, state: Path, namespace: str) -> None:
        self._root = state / "fifo"
        self._directory = self._root / namespace

    @contextmanager
    def make(self, id: str, exec_id: str = "", *, stdin: bool, terminal: bool) -> Iterator[Place]:
        """New ones for a process of the container `id`, with nobody else attached to it for the length of the block."""
        name = f"{_EXEC}{exec_id}" if exec_id else f"{_FIRST}{secrets.token_hex(4)}"
        path = self._directory / id / name
        wanted = [*(["stdin"] if stdin else []), "stdout", *([] if terminal else ["stderr"])]
        try:
            with self._exclusively():
                path.mkdir(parents=True, mode=0o700)
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise from_exception(error) from None
        place = Place(path, Stdio(terminal=terminal, **{one: str(path / one) for one in wanted}))
        try:
            for one in wanted:
                os.mkfifo(path / one, 0o600)
            yield place
        finally:
            if not place.kept:
                with self._exclusively():
                    _remove(path)
            os.close(lock)

    def remove(self, id: str) -> None:
        """Removes those of a container that is gone; a client that is still attached removes its own."""
        for found, name in self._unused():
            if found == id:
                self._remove_unused(found, name)

    async def sweep(self, client: Client) -> None:
        """Removes what clients that were killed have left, once nothing can want it any more."""
        unused = self._unused()
        if not unused:
            return
        containers = await client.collect(runtime.CONTAINER_LIST, runtime.ListContainers(specs=False))
        known = {container.id for container in containers}
        for id, name in unused:
            if id not in known or not name.startswith(_FIRST):  # that of a first process may be started again
                self._remove_unused(id, name)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """While a directory is made or removed: one that isn't locked yet isn't unused."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _unused(self) -> list[tuple[str, str]]:
        found = []
        with suppress(FileNotFoundError):
            for container in self._directory.iterdir():
                with suppress(FileNotFoundError):
                    found += [(container.name, path.name) for path in container.iterdir() if _is_unused(path)]
        return found

    def _remove_unused(self, id: str, name: str) -> None:
        path = self._directory / id / name
        with self._exclusively():
            if _is_unused(path):
                _remove(path)


@contextmanager
def attached(stdio: Stdio, what: str) -> Iterator[None]:
    """While it lasts, nobody else attaches. FAILED_PRECONDITION when somebody is, or there is nothing to attach to."""
    paths = [path for path in (stdio.stdin, stdio.stdout, stdio.stderr) if path]
    if paths and not any(Path(path.removeprefix("file://")).exists() for path in paths):
        raise FailedPrecondition(f"{what}: its streams aren't on this machine", hint="attach to it where its node is")
    if not paths or not all(Path(path).is_fifo() for path in paths):
        raise FailedPrecondition(
            f"{what}: has no streams to attach to", hint="start it with `shoal run -d -i`, or with -t for a terminal"
        )
    lock = os.open(Path(paths[0]).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(f"{what}: somebody else is attached", hint="detach there first") from None
        yield
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.parent.rmdir()  # others of the container may be left


def _is_unused(path: Path) -> bool:
    """Whether no shim has its output open, as it does until the process has ended, and no client is attached."""
    try:
        os.close(os.open(path / "stdout", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return False
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENOENT):  # ENXIO: nobody reads it (fifo(7))
            return False
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
