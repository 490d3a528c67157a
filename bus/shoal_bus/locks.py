"""Locks between the copies of a service that die with their holder: byte ranges of one file.

Open-file-description locks (fcntl(2), F_OFD_SETLK) on one byte for each key: nothing to clean up, nothing left by a
`kill -9`, and a million keys cost one file descriptor. Inside a process the same key is held once at a time too.

A forked child would keep its parent's locks alive, so it loses the file descriptor at the fork.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import struct
import weakref
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

F_OFD_SETLK = 37
_FLOCK = "hhqqi4x"  # struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.002, 0.1

_open: weakref.WeakSet[Locks] = weakref.WeakSet()


class Locks:
    """The locks of one file, as seen by one process. Not for use from several threads."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Keys this process holds or is about to, each with those of this process who wait for it.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        _open.add(self)

    def close(self) -> None:
        """Lets go of every lock."""
        _open.discard(self)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def try_acquire(self, key: str) -> bool:
        """Takes the lock if nobody has it, and says whether it did."""
        if key in self._waiting or not self._set(key, fcntl.F_WRLCK):
            return False
        self._waiting[key] = deque()
        return True

    async def acquire(self, key: str) -> None:
        """Takes the lock, waiting as long as it takes. In one process, who came first is first."""
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = deque()
        else:
            turn = asyncio.get_running_loop().create_future()
            waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.cancelled():
                    with suppress(ValueError):
                        waiting.remove(turn)
                else:
                    self._next(key)  # our turn had come just before
                raise
        try:
            delay = _FIRST_POLL_SECONDS
            while not self._set(key, fcntl.F_WRLCK):
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_POLL_SECONDS)
        except BaseException:
            self._next(key)
            raise

    def release(self, key: str) -> None:
        """Gives the lock back."""
        # The file's lock goes first: the next one in this process takes it anew, so that other copies get a chance.
        if self._fd >= 0:
            self._set(key, fcntl.F_UNLCK)
        self._next(key)

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Holds the lock for a block."""
        await self.acquire(key)
        try:
            yield
        finally:
            self.release(key)

    def _next(self, key: str) -> None:
        waiting = self._waiting[key]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._waiting[key]

    def _set(self, key: str, kind: int) -> bool:
        offset = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 2
        try:
            fcntl.fcntl(self._fd, F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, offset, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True


def _close_in_child() -> None:
    for locks in list(_open):
        locks.close()


os.register_at_fork(after_in_child=_close_in_child)
