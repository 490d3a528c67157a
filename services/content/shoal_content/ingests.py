"""Ingests: blobs in the making, resumable after any interruption.

An ingest's row comes before its file, and the file's length is how far it is: nothing else has to be kept in step. One
that starts over gets a new file; the old one is unlinked and never truncated, so that whoever reads along keeps what he
has read. Whoever writes holds a lock of the ingest (the harness's for a client, `blob <digest>` for a pull).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from shoal_bus.api.content import IngestRequest, IngestStatus, ListBlobs, WriteIngest
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import AlreadyExists, FailedPrecondition, NotFound, OutOfRange
from shoal_bus.filters import compile_filters
from shoal_bus.message import Empty
from shoal_bus.types import Labels

from shoal_content.labels import dump, load
from shoal_content.layout import Layout, hash_file, sync
from shoal_content.leasing import attach
from shoal_content.store import Store

_DEFAULT_ALGORITHM = "sha256"


class Writer:
    """An ingest's file, being appended to and hashed on the way.

    with await Writer.open(path, "sha256") as writer:
        await writer.write(data)
        writer.digest, writer.offset
    """

    def __init__(self, path: Path, hashed: hashlib._Hash, offset: int) -> None:
        self.path, self.offset = path, offset
        self._hash = hashed
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @classmethod
    async def open(cls, path: Path, algorithm: str) -> Self:
        """The writer of a file that may hold the first bytes already."""
        hashed, offset = await asyncio.to_thread(hash_file, path, algorithm)
        return cls(path, hashed, offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def digest(self) -> str:
        """The digest of what there is so far."""
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    async def write(self, data: bytes) -> None:
        """Appends. A failed write leaves at most a piece of `data` behind the rest, which the next opener finds."""
        writing = asyncio.ensure_future(asyncio.to_thread(self._write, data))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})  # the thread still uses the file
            raise

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self.offset)
            self.offset += written
            view = view[written:]


class Ingests:
    """The ingests of one node."""

    def __init__(self, database: Database, layout: Layout, store: Store) -> None:
        self._db, self._layout, self._store = database, layout, store

    # -------------------------------------------------------------------------------------------------------- handlers

    async def write(self, ctx: Context, request: WriteIngest) -> IngestStatus:
        """Appends a client's bytes, and commits them where asked."""
        row = self._find(ctx.namespace, request.ref)
        if row is not None and row["pull"]:
            raise FailedPrecondition(f"ingest {request.ref}: belongs to a pull under way", hint="choose another ref")
        if row is None and request.offset:
            raise OutOfRange(f"ingest {request.ref}: is at 0, not at {request.offset}")
        if row is None and request.expected and self._store.sees(ctx.namespace, request.expected):
            self._lease(ctx, request.expected)
            raise AlreadyExists(f"blob {request.expected}: is there already")
        path = self.begin(
            ctx.namespace, request.ref, request.expected or "", request.total, "", request.labels, ctx.lease
        )
        offset = await asyncio.to_thread(self._append, path, ctx, request)
        with self._db.write() as tx:
            tx.execute(
                "UPDATE ingests SET updated_at = ?, total = max(total, ?), expected = coalesce(nullif(?, ''), expected)"
                " WHERE namespace = ? AND ref = ?",
                (time.time(), request.total, request.expected or "", ctx.namespace, request.ref),
            )
            row = self._row(ctx.namespace, request.ref)
            told = self._status(row, offset)
            if not request.commit:
                ctx.answer(tx, told)
        return await self._commit(ctx, request, row, path) if request.commit else told

    async def status(self, ctx: Context, request: IngestRequest) -> IngestStatus:
        """How far an ingest is."""
        return self._status(self._row(ctx.namespace, request.ref))

    async def list(self, ctx: Context, request: ListBlobs) -> AsyncIterator[IngestStatus]:
        """The ingests of the namespace that match, by their refs."""
        matches = compile_filters(request.filters)
        for row in self._db.read("SELECT * FROM ingests WHERE namespace = ? ORDER BY ref", (ctx.namespace,)):
            if matches(lambda path, row=row: row["ref"] if list(path) == ["ref"] else None):  # type: ignore[misc]
                yield self._status(row)

    async def abort(self, ctx: Context, request: IngestRequest) -> Empty:
        """Drops an ingest; one that a pull is at is the pull's."""
        with self._db.write() as tx:
            row = self._row(ctx.namespace, request.ref)
            if row["pull"]:
                raise FailedPrecondition(f"ingest {request.ref}: belongs to a pull under way", hint="cancel the pull")
            self._drop(tx, row)
            ctx.answer(tx, Empty())
        self._layout.ingest(row["file"]).unlink(missing_ok=True)
        return Empty()

    # ------------------------------------------------------------------------------------------------------ for pulls

    def begin(
        self, namespace: str, ref: str, expected: str, total: int, pull: str, labels: Labels, lease: str = ""
    ) -> Path:
        """The file of an ingest, begun now or before. `pull` takes over one that another pull left."""
        now = time.time()
        with self._db.write() as tx:
            tx.execute(
                "INSERT OR IGNORE INTO ingests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (namespace, ref, secrets.token_hex(16), total, expected, pull, dump(labels), now, now),
            )
            attach(tx, namespace, lease, "ingests", ref)
            if pull:
                tx.execute(
                    "UPDATE ingests SET pull = ?, updated_at = ? WHERE namespace = ? AND ref = ?",
                    (pull, now, namespace, ref),
                )
            return self._layout.ingest(self._row(namespace, ref)["file"])

    def restart(self, namespace: str, ref: str) -> Path:
        """A new file for an ingest whose bytes were wrong."""
        with self._db.write() as tx:
            old = self._row(namespace, ref)["file"]
            file = secrets.token_hex(16)
            tx.execute("UPDATE ingests SET file = ? WHERE namespace = ? AND ref = ?", (file, namespace, ref))
        self._layout.ingest(old).unlink(missing_ok=True)
        return self._layout.ingest(file)

    def commit(self, tx: Transaction, namespace: str, ref: str, digest: str, size: int) -> None:
        """A whole, verified and synced ingest becomes a blob."""
        row = self._row(namespace, ref)
        self._store.add(tx, namespace, self._layout.ingest(row["file"]), digest, size, load(row["labels"]))
        self._drop(tx, row)

    def remove_files_of(self, pull: str, condition: Callable[[Transaction], bool] = lambda _: True) -> None:
        """Removes the files of a pull's ingests. Their rows stay, at 0: a full disk may refuse to change them."""
        with self._db.write() as tx:  # it keeps another pull from taking one over meanwhile
            if not condition(tx):
                return
            for row in tx.execute("SELECT file FROM ingests WHERE pull = ?", (pull,)).fetchall():
                self._layout.ingest(row["file"]).unlink(missing_ok=True)

    def drop_of(self, tx: Transaction, pull: str) -> None:
        """Forgets the ingests of a pull that is over; what is left of their files goes once that is certain.

        Also one that succeeded may have some: another pull was faster with a blob, while this one's copy was dead.
        """
        for row in tx.execute("DELETE FROM ingests WHERE pull = ? RETURNING file", (pull,)).fetchall():
            file = self._layout.ingest(row["file"])
            tx.on_commit(lambda file=file: file.unlink(missing_ok=True))  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------------ for collections

    def drop(self, tx: Transaction, namespace: str, ref: str) -> None:
        """Drops an ingest that nothing holds, and whose lock is held."""
        row = self._row(namespace, ref)
        self._drop(tx, row)
        tx.on_commit(lambda: self._layout.ingest(row["file"]).unlink(missing_ok=True))

    # --------------------------------------------------------------------------------------------------------- within

    def _lease(self, ctx: Context, digest: str) -> None:
        """Has the request's lease, if there is one, hold a blob that is there already."""
        if ctx.lease:
            with self._db.write() as tx:
                attach(tx, ctx.namespace, ctx.lease, "content", digest)

    @staticmethod
    def _drop(tx: Transaction, row: sqlite3.Row) -> None:
        where = (row["namespace"], row["ref"])
        tx.execute("DELETE FROM ingests WHERE namespace = ? AND ref = ?", where)
        tx.execute("DELETE FROM lease_resources WHERE namespace = ? AND type = 'ingests' AND id = ?", where)

    @staticmethod
    def _append(path: Path, ctx: Context, request: WriteIngest) -> int:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            # A resumed request finds some of its own bytes, or all of them: it writes the same ones again.
            mine = ctx.resumed and request.offset <= size <= request.offset + len(request.data)
            if request.offset != size and not mine:
                raise OutOfRange(
                    f"ingest {request.ref}: is at {size}, not at {request.offset}", hint="ask how far it is"
                )
            try:
                view, at = memoryview(request.data), request.offset
                while view:
                    written = os.pwrite(fd, view, at)
                    at, view = at + written, view[written:]
            except OSError:
                os.ftruncate(fd, request.offset)  # nobody reads along with a client's ingest
                raise
            return at
        finally:
            os.close(fd)

    async def _commit(self, ctx: Context, request: WriteIngest, row: sqlite3.Row, path: Path) -> IngestStatus:
        expected, total = row["expected"], row["total"]
        algorithm = expected.partition(":")[0] or _DEFAULT_ALGORITHM
        hashed, size = await asyncio.to_thread(hash_file, path, algorithm)
        digest = f"{algorithm}:{hashed.hexdigest()}"
        if total and size != total:
            raise FailedPrecondition(f"ingest {request.ref}: has {size} bytes, {total} were announced")
        if expected and digest != expected:
            raise FailedPrecondition(f"ingest {request.ref}: its digest is {digest}, {expected} was announced")
        if self._store.sees(ctx.namespace, digest):
            with self._db.write() as tx:
                self._drop(tx, row)
            self._lease(ctx, digest)
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise AlreadyExists(f"blob {digest}: is there already")
        await asyncio.to_thread(sync, path)
        told = self._status(row, size).model_copy(update={"committed": digest})
        with self._db.write(durable=True) as tx:
            tx.execute(
                "UPDATE ingests SET labels = ? WHERE namespace = ? AND ref = ?",
                (dump(load(row["labels"]) | request.labels), ctx.namespace, request.ref),
            )
            self.commit(tx, ctx.namespace, request.ref, digest, size)
            attach(tx, ctx.namespace, ctx.lease, "content", digest)
            ctx.answer(tx, told)
        return told

    def _status(self, row: sqlite3.Row, offset: int | None = None) -> IngestStatus:
        if offset is None:
            try:
                offset = self._layout.ingest(row["file"]).stat().st_size
            except FileNotFoundError:
                offset = 0
        return IngestStatus(
            ref=row["ref"],
            offset=offset,
            total=row["total"],
            expected=row["expected"],
            started_at=datetime.fromtimestamp(row["started_at"], UTC),
            updated_at=datetime.fromtimestamp(row["updated_at"], UTC),
        )

    def _find(self, namespace: str, ref: str) -> sqlite3.Row | None:
        return self._db.read_one("SELECT * FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref))

    def _row(self, namespace: str, ref: str) -> sqlite3.Row:
        row = self._find(namespace, ref)
        if row is None:
            raise NotFound(f"ingest {ref}: not found")
        return row
