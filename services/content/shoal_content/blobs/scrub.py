"""Scrubbing: blobs are read and compared with their digests, on demand and, slowly, all the time.

A damaged blob is first put on record as rotten, durably and with an event in each namespace that sees it; its bytes
are then set aside under `quarantine/`, from where nothing here deletes them. Both happen only if the file is still the
one that was read: a blob that was removed, or healed, meanwhile is left alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Self

import structlog
from shoal_bus.api.content import (
    CONTENT_ROTTEN,
    ContentRotten,
    RottenBlob,
    ScrubBlobs,
    ScrubProgress,
    ScrubReport,
)
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import NotFound
from shoal_bus.locks import Locks

from shoal_content.blobs.layout import Layout
from shoal_content.blobs.store import Store

log = structlog.get_logger(__name__)

EVERY_SECONDS = 7 * 24 * 3600.0
"""From the end of a pass over all blobs to the beginning of the next."""
BYTES_A_SECOND = 16 << 20
"""What a pass reads at most."""
_LOOK_SECONDS = 60.0
_LOCK = "scrub pass"
_BLOCK = 1 << 20
_PAGE = 500

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}.get(os.uname().machine, 0)
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE, _IOPRIO_CLASS_SHIFT = 1, 3, 13
_LOWEST_PRIORITY = 19


@dataclass
class _Read:
    """A file that was read: which one, and what is wrong with it. While it is open its inode is no other file's."""

    inode: int = 0
    problem: str = "its file is gone"
    size: int = 0
    file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


class Scrub:
    """`BLOB_SCRUB`, and the pass in the background."""

    def __init__(
        self,
        database: Database,
        layout: Layout,
        store: Store,
        locks: Locks,
        *,
        every: float = EVERY_SECONDS,
        rate: float = BYTES_A_SECOND,
    ) -> None:
        self._db, self._layout, self._store, self._locks = database, layout, store, locks
        self._every, self._rate = every, rate

    # ------------------------------------------------------------------------------------------------------- operation

    async def scrub(self, ctx: Context, request: ScrubBlobs) -> ScrubReport:
        """Checks blobs that the namespace sees. NOT_FOUND for one that it doesn't."""
        wanted = self._wanted(ctx.namespace, request.digests)
        progress = ScrubProgress(blobs_total=len(wanted), bytes_total=sum(wanted.values()))
        report = ScrubReport()
        for digest, size in wanted.items():
            known = self._problem(digest)
            if known is None:
                before = progress.bytes_done

                def tell(offset: int, before: int = before) -> None:
                    progress.bytes_done = before + offset
                    ctx.progress(progress)

                report.blobs, report.bytes = report.blobs + 1, report.bytes + size
                await self._check(digest, size, tell)
                known = self._problem(digest)
                progress.bytes_done = before + size
            else:
                progress.bytes_done += size
            progress.blobs_done += 1
            ctx.progress(progress)
            if known is not None:
                report.rotten.append(RottenBlob(digest=digest, size=size, problem=known))
        return report

    async def undo(self, ctx: Context, request: ScrubBlobs) -> None:
        """There is nothing to undo: what was found is true."""

    def _wanted(self, namespace: str, digests: list[str]) -> dict[str, int]:
        rows = self._db.read(
            "SELECT digest, size FROM visible JOIN blobs USING (digest) WHERE namespace = ? ORDER BY digest",
            (namespace,),
        )
        sizes = {row["digest"]: row["size"] for row in rows}
        for digest in digests:
            if digest not in sizes:
                raise NotFound(f"blob {digest}: not found")
        return {digest: sizes[digest] for digest in dict.fromkeys(digests)} if digests else sizes

    # ------------------------------------------------------------------------------------------------------ background

    async def run(self) -> None:
        """Passes over all blobs of the node, one after the other, by one copy of this service at a time."""
        while True:
            if self.due() and self._locks.try_acquire(_LOCK):
                try:
                    await self.go_on()
                except Exception:
                    log.exception("scrub.failed")
                finally:
                    self._locks.release(_LOCK)
            await asyncio.sleep(_LOOK_SECONDS)

    def due(self) -> bool:
        """Whether a pass is under way, or it is time for one. The first one's time begins with the first question."""
        row = self._db.read_one("SELECT * FROM scrub")
        if row is None:
            with self._db.write() as tx:
                tx.execute("INSERT OR IGNORE INTO scrub VALUES (1, '', ?)", (time.time(),))
            return False
        return bool(row["position"]) or not 0 <= time.time() - row["ended_at"] < self._every

    async def go_on(self) -> None:
        """A pass, from where the last one stopped, to its end."""
        row = self._db.read_one("SELECT position FROM scrub")
        position, found = row["position"] if row is not None else "", 0
        with ThreadPoolExecutor(1, "scrub", _step_back) as thread:
            while rows := self._db.read(
                "SELECT * FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?", (position, _PAGE)
            ):
                for row in rows:
                    position = row["digest"]
                    if self._problem(position) is None:
                        found += await self._check(position, row["size"], thread=thread, rate=self._rate)
                    self._stand(position)
        self._stand("", ended=True)
        log.info("scrub.done", rotten=found)

    def _stand(self, position: str, *, ended: bool = False) -> None:
        with self._db.write() as tx:
            tx.execute(
                "INSERT INTO scrub VALUES (1, ?1, ?2) ON CONFLICT DO UPDATE SET position = ?1,"
                " ended_at = CASE WHEN ?3 THEN ?2 ELSE ended_at END",
                (position, time.time(), ended),
            )

    # ---------------------------------------------------------------------------------------------------------- within

    async def _check(
        self,
        digest: str,
        size: int,
        report: Callable[[int], None] | None = None,
        *,
        thread: ThreadPoolExecutor | None = None,
        rate: float = 0.0,
    ) -> bool:
        """Reads a blob, and says whether it was found damaged."""
        enough, offset = threading.Event(), [0]
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(thread, self._read, digest, size, rate, enough, offset)
        try:
            while not (await asyncio.wait({reading}, timeout=0.2))[0]:
                if report is not None:
                    report(offset[0])
        except BaseException:
            enough.set()
            await asyncio.wait({reading})
            with reading.result():
                raise
        with reading.result() as read:
            if not read.problem:
                return False
            with self._db.write(durable=True) as tx:
                condemned = self.condemn(tx, digest, read)
        self.set_aside(digest)
        return condemned

    def _read(self, digest: str, size: int, rate: float, enough: threading.Event, offset: list[int]) -> _Read:
        """In a thread. What is in memory is dropped first: it is the disk that is asked."""
        algorithm, _, expected = digest.partition(":")
        hashed = hashlib.new(algorithm)
        read = _Read()
        try:
            read.file = file = self._layout.path(digest).open("rb", buffering=0)
            status = os.fstat(file.fileno())
            read.inode, read.size = status.st_ino, status.st_size
            if read.size != size:
                read.problem = f"it has {read.size} bytes instead of {size}"
                return read
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while block := file.read(_BLOCK):
                if enough.wait(len(block) / rate if rate else 0) or enough.is_set():
                    read.problem = ""  # nobody asks any more
                    return read
                hashed.update(block)
                offset[0] += len(block)
            if rate:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except FileNotFoundError:
            return read
        except OSError as error:
            read.problem = f"it can't be read at {offset[0]} ({error.strerror})"
            return read
        found = hashed.hexdigest()
        read.problem = "" if found == expected else f"its digest is {algorithm}:{found}"
        return read

    def condemn(self, tx: Transaction, digest: str, read: _Read | None = None) -> bool:
        """Puts a blob on record as rotten, unless its file isn't the one that was read. Says whether it did."""
        row = tx.execute("SELECT size FROM blobs WHERE digest = ?", (digest,)).fetchone()
        if row is None or tx.execute("SELECT 1 FROM rotten WHERE digest = ?", (digest,)).fetchone():
            return False
        now = _Read()
        with suppress(FileNotFoundError):
            status = self._layout.path(digest).stat()
            now = _Read(status.st_ino, f"it has {status.st_size} bytes instead of {row['size']}", status.st_size)
        if read is None:
            read = now
        elif (read.inode, read.size) != (now.inode, now.size):
            return False
        tx.execute("INSERT INTO rotten VALUES (?, ?, ?, ?)", (digest, read.problem, read.inode, time.time()))
        self._store.end_claims_while_seen(tx, digest)
        told = ContentRotten(digest=digest, size=row["size"], problem=read.problem)
        for seen in tx.execute("SELECT namespace FROM visible WHERE digest = ?", (digest,)).fetchall():
            tx.emit(seen["namespace"], CONTENT_ROTTEN, told)
        log.error("blob.rotten", digest=digest, size=row["size"], problem=read.problem)
        return True

    def set_aside(self, digest: str = "") -> None:
        """Takes the bytes of what is on record as rotten from their places; of one blob, or (at a start) of all."""
        with self._db.write() as tx:
            rows = tx.execute("SELECT digest FROM rotten WHERE ? IN ('', digest)", (digest,)).fetchall()
            for row in rows:
                self._store.set_aside(tx, row["digest"])

    def _problem(self, digest: str) -> str | None:
        row = self._db.read_one("SELECT problem FROM rotten WHERE digest = ?", (digest,))
        return row["problem"] if row is not None else None


def _step_back() -> None:
    """Lets everybody else on the machine go first: idle I/O class (ioprio_set(2)), and the lowest CPU priority."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, _LOWEST_PRIORITY)  # a thread's own, on Linux
    if _SYS_IOPRIO_SET:
        _LIBC.syscall(_SYS_IOPRIO_SET, _IOPRIO_WHO_PROCESS, thread, _IOPRIO_CLASS_IDLE << _IOPRIO_CLASS_SHIFT)
