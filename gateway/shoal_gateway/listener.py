"""The gateway's Unix socket: there at once or not at all, its owner's alone, and shared by the copies of one node.

gRPC binds a name of this copy's own beside the path; the path itself is a hard link to it, put in place by rename(2).
So there is no moment in which the path is missing, refuses, or is open to more than its mode says. A Unix socket can't
be shared by several listeners: the copy that started last has the path and gets the new connections, the others keep
theirs. When its holder is gone, also by `kill -9`, another copy takes the path over.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import structlog
from shoal_bus.errors import FailedPrecondition, InvalidArgument

log = structlog.get_logger(__name__)

MODE = 0o660
_LONGEST = 107
_WATCH_SECONDS = 1.0
_CONNECT_SECONDS = 1.0


class Listener:
    """The path clients connect to, and this copy's own name beside it, which gRPC is to bind."""

    def __init__(self, path: Path, owner: tuple[int, int] = (0, 0)) -> None:
        """`owner` is the user and the group that the socket belongs to."""
        self.path, self._owner = path.absolute(), owner
        self._prefix = f".{zlib.crc32(os.fsencode(self.path.name)):08x}."  # shorter than most names, and one for each
        self.own = self.path.with_name(f"{self._prefix}{os.getpid()}")
        longest = max(len(os.fsencode(one.name)) for one in (self.path, self.own))
        if len(os.fsencode(self.path.parent)) + 1 + longest > _LONGEST:
            room = _LONGEST - longest - 1
            raise InvalidArgument(
                f"{self.path}: too long for a Unix socket",
                hint=f"its directory has {room} characters at most",
            )

    @contextmanager
    def binding(self) -> Iterator[str]:
        """Around gRPC's bind to the address it yields: the socket is made with its mode, not given it afterwards."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
        if self.path.exists() and not self.path.is_socket():
            raise FailedPrecondition(f"{self.path}: there is something that isn't a socket")
        self._sweep()
        self.own.unlink(missing_ok=True)
        mask = os.umask(0o777 & ~MODE)
        try:
            yield f"unix:{self.own}"
        finally:
            os.umask(mask)
        if any(self._owner):
            os.chown(self.own, *self._owner)

    @asynccontextmanager
    async def published(self) -> AsyncIterator[None]:
        """Puts the socket at its path for a block, and keeps it there while no other copy has it."""
        self._publish()
        watch = asyncio.create_task(self._watch(), name="socket watch")
        try:
            yield
        finally:
            watch.cancel()
            if self._mine():
                self.path.unlink(missing_ok=True)
            self.own.unlink(missing_ok=True)

    def _publish(self) -> None:
        link = self.own.with_name(f"{self.own.name}.new")
        link.unlink(missing_ok=True)
        os.link(self.own, link)
        link.rename(self.path)
        # rename(2) does nothing where both names are links to one file already.
        link.unlink(missing_ok=True)
        log.info("socket.published", path=str(self.path))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                if not self._mine() and not await asyncio.to_thread(alive, self.path):
                    self._publish()
            except OSError as error:
                log.warning("socket.not_published", path=str(self.path), error=str(error))

    def _mine(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(self.path.lstat(), self.own.lstat())
        return False

    def _sweep(self) -> None:
        """Removes what copies that were killed left beside the path."""
        for other in self.path.parent.glob(f"{self._prefix}*"):
            if stat.S_ISSOCK(other.lstat().st_mode) and not alive(other):
                other.unlink(missing_ok=True)


def alive(path: Path) -> bool:
    """Whether somebody listens at `path`."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONNECT_SECONDS)
        try:
            client.connect(str(path))
        except TimeoutError:
            return True  # busy isn't gone
        except OSError:
            return False
    return True
