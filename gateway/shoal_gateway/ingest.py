"""An ingest that a call writes to, as its only writer: in its own file on the gateway's node, else over the bus.

    async with Ingest.opened(call, "layer-1", total=1024, expected=digest) as ingest:
        await ingest.write(data)
        await ingest.commit(1024, digest, {"app": "web"})

Without a commit it stays as far as it is, for whoever goes on with it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

from shoal_bus.api import content
from shoal_bus.errors import Aborted, AlreadyExists, FailedPrecondition, ShoalError
from shoal_bus.together import in_thread, to_its_end
from shoal_bus.types import Labels

from shoal_gateway.call import Call

_ADVANCE_BYTES = 8 << 20
"""After so many bytes, or seconds, the content service is told how far the file is: it hashes it meanwhile."""
_ADVANCE_SECONDS = 10.0
_SMALL = 64 << 10
"""Bytes that are written and hashed sooner than a thread would have begun to."""
_BLOCK = 1 << 20
_OVERHEAD = 2048
"""What a request takes besides its data and a ref."""


class Ingest:
    """One ingest, being written to."""

    def __init__(self, call: Call, ref: str, expected: str | None) -> None:
        self._call, self._ref, self._expected = call, ref, expected
        self._session = secrets.token_hex(16)
        self._steps = 0
        self._file: _File | None = None
        self._ended = False
        self.offset = 0
        self.digest = ""
        """Of the bytes so far."""
        self.started_at = self.updated_at = datetime.now(UTC)

    @classmethod
    @asynccontextmanager
    async def opened(cls, call: Call, ref: str, total: int, expected: str | None) -> AsyncIterator[Ingest]:
        """An ingest for a block, begun or gone on with. ALREADY_EXISTS for a blob, UNAVAILABLE for another's ingest."""
        ingest = cls(call, ref, expected)
        await ingest._open(total)
        try:
            yield ingest
        finally:
            await to_its_end(ingest._close())

    async def write(self, data: bytes) -> None:
        """Appends."""
        if self._file is not None:
            await self._file.append(data)
            self._tell_file(self._file)
            return
        limit = self._call.largest - _OVERHEAD - len(self._ref.encode())
        for at in range(0, len(data), limit):
            piece = data[at : at + limit]
            self._tell(await self._ask_write(content.WriteIngest(ref=self._ref, offset=self.offset, data=piece)))

    async def truncate(self) -> None:
        """Drops what has been written."""
        await self._let_go()
        await self._ask_write(content.WriteIngest(ref=self._ref, truncate=True))
        await self._open(0)

    async def commit(self, total: int, expected: str | None, labels: Labels) -> None:
        """Makes a blob of it. FAILED_PRECONDITION where size or digest are others, ALREADY_EXISTS."""
        await self._let_go()
        request = content.WriteIngest(
            ref=self._ref, offset=self.offset, total=total, expected=expected, labels=labels, commit=True
        )
        try:
            committed = await self._ask_write(request)
        except FailedPrecondition:
            # In containerd's words, which clients show.
            if total and total != self.offset:
                raise FailedPrecondition(
                    f"{self._ref!r} failed size validation: {self.offset} != {total}: failed precondition"
                ) from None
            raise FailedPrecondition(
                f"unexpected commit digest {self.digest}, expected {expected}: failed precondition"
            ) from None
        except AlreadyExists:
            raise AlreadyExists(f"content {expected or self.digest}: already exists") from None
        self._tell(committed)
        self.digest = committed.committed or self.digest
        self._ended = True

    async def abort(self) -> None:
        """Drops it."""
        await self._let_go()
        self._ended = True
        await self._call.ask(content.INGEST_ABORT, content.IngestRequest(ref=self._ref))

    # ---------------------------------------------------------------------------------------------------------- within

    async def _open(self, total: int) -> None:
        request = content.OpenIngest(
            ref=self._ref, session=self._session, total=total, expected=self._expected, overrule=True, claim=True
        )
        opened = await self._call.ask(content.INGEST_OPEN, request, step=self._step("open"), long=True)
        self._tell(opened)
        self._file = await _File.opened(self._call, opened, self._session, self._expected)

    async def _ask_write(self, request: content.WriteIngest) -> content.IngestStatus:
        asked = request.model_copy(update={"session": self._session, "overrule": True})
        return await self._call.ask(content.INGEST_WRITE, asked, step=self._step("write"), long=True)

    def _step(self, name: str) -> str:
        self._steps += 1
        return f"{name}.{self._steps}"

    def _tell(self, status: content.IngestStatus) -> None:
        self.offset, self.digest = status.offset, status.digest or self.digest
        self.started_at, self.updated_at = status.started_at, status.updated_at

    def _tell_file(self, file: _File) -> None:
        self.offset, self.digest, self.updated_at = file.offset, file.digest, datetime.now(UTC)

    async def _let_go(self) -> None:
        """Ends the writing to the file itself: the content service needs it alone for whatever comes next."""
        file, self._file = self._file, None
        if file is not None:
            await file.close()

    async def _close(self) -> None:
        """Leaves the ingest to others; the hold on it would end by itself."""
        await self._let_go()
        if not self._ended:
            await self._call.undo(content.INGEST_RELEASE, content.ReleaseIngest(ref=self._ref, session=self._session))


class _File:
    """An ingest's own file, locked. Hashed here to tell the client, and by the content service to be certain."""

    def __init__(self, call: Call, fd: int, opened: content.IngestStatus, session: str, algorithm: str) -> None:
        self._call, self._fd, self._ref, self._session = call, fd, opened.ref, session
        self._hash = hashlib.new(algorithm)
        self.offset = 0
        self._told, self._told_at = 0, time.monotonic()
        self._advancing: asyncio.Task[None] | None = None
        self._advances = 0

    @classmethod
    async def opened(cls, call: Call, opened: content.IngestStatus, session: str, expected: str | None) -> _File | None:
        """None: the node's file system is another one. ABORTED where it has been taken away again."""
        try:
            fd = os.open(opened.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there, locked = os.stat(opened.path), os.fstat(fd)  # noqa: PTH116
            if (there.st_dev, there.st_ino) != (locked.st_dev, locked.st_ino):
                raise FileNotFoundError
            file = cls(call, fd, opened, session, (expected or opened.digest).partition(":")[0])
            if locked.st_size:
                await in_thread(file._catch_up, locked.st_size)
        except (BlockingIOError, FileNotFoundError):
            os.close(fd)
            raise Aborted(f"ingest {opened.ref}: has been taken over by another writer", hint="try again") from None
        except BaseException:
            os.close(fd)
            raise
        return file

    @property
    def digest(self) -> str:
        """Of all there is."""
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    async def append(self, data: bytes) -> None:
        """Writes and hashes; what can't be written whole isn't there."""
        if len(data) <= _SMALL:
            self._append(data)
        else:
            await in_thread(self._append, data)
        silent = time.monotonic() - self._told_at > _ADVANCE_SECONDS
        if (self.offset - self._told >= _ADVANCE_BYTES or silent) and self._advancing is None:
            self._advancing = asyncio.create_task(self._advance())

    async def close(self) -> None:
        """Lets go of the file, once nobody is at it any more."""
        if self._advancing is not None:
            await self._advancing
        os.close(self._fd)

    def _append(self, data: bytes) -> None:
        view, at = memoryview(data), self.offset
        try:
            while view:
                written = os.pwrite(self._fd, view, at)
                at, view = at + written, view[written:]
        except OSError:
            os.ftruncate(self._fd, self.offset)
            raise
        os.utime(self._fd, ns=(time.time_ns(),) * 2)  # the kernel's own clock for that may be a tick behind
        self._hash.update(data)
        self.offset = at

    def _catch_up(self, size: int) -> None:
        while self.offset < size and (block := os.pread(self._fd, _BLOCK, self.offset)):
            self._hash.update(block)
            self.offset += len(block)

    async def _advance(self) -> None:
        """Best effort: what isn't hashed meanwhile is hashed at the commit, and the lock keeps others off, too."""
        self._told, self._told_at = self.offset, time.monotonic()
        self._advances += 1
        request = content.AdvanceIngest(ref=self._ref, session=self._session, offset=self.offset)
        try:
            with suppress(ShoalError):
                await self._call.ask(content.INGEST_ADVANCE, request, step=f"advance.{self._advances}")
        finally:
            self._advancing = None
