"""Blobs: the node's bytes, and what each namespace sees of them.

A namespace sees a blob that it wrote or pulled; bytes that are on the node already aren't fetched twice (containerd's
`shared` policy). Rows and files change together: a file comes to its place inside the transaction that says it is
there, and goes in a transaction that finds it unwanted, so that no two copies of this service ever disagree.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from shoal_bus.api.content import (
    CONTENT_CREATE,
    CONTENT_DELETE,
    BlobInfo,
    BlobRequest,
    Chunk,
    Claim,
    ClaimBlob,
    ContentDeleted,
    ContentEvent,
    ListBlobs,
    ReadBlob,
)  # fmt: skip
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import FailedPrecondition, NotFound, OutOfRange
from shoal_bus.filters import compile_filters, label_field
from shoal_bus.message import Empty
from shoal_bus.types import Labels

from shoal_content.labels import dump, load
from shoal_content.layout import Layout

_PAGE = 500
_CHUNK = 256 * 1024


class Store:
    """The blobs of one node."""

    def __init__(self, database: Database, layout: Layout) -> None:
        self.db, self.layout = database, layout

    # -------------------------------------------------------------------------------------------------------- handlers

    async def info(self, ctx: Context, request: BlobRequest) -> BlobInfo:
        """What is known of a blob."""
        return _info(self._row(ctx.namespace, request.digest))

    async def list(self, ctx: Context, request: ListBlobs) -> AsyncIterator[BlobInfo]:
        """The blobs of the namespace that match, by digest."""
        matches = compile_filters(request.filters)
        after = ""
        while rows := self.db.read(f"{_SELECT} AND digest > ? ORDER BY digest LIMIT ?", (ctx.namespace, after, _PAGE)):
            for info in map(_info, rows):
                if matches(lambda path, info=info: _field(info, path)):  # type: ignore[misc]
                    yield info
            after = rows[-1]["digest"]

    async def read(self, ctx: Context, request: ReadBlob) -> AsyncIterator[Chunk]:
        """A range of a blob's bytes; one that is removed meanwhile is read to its end."""
        size = self._row(ctx.namespace, request.digest)["size"]
        if request.offset > size:
            raise OutOfRange(f"blob {request.digest}: has {size} bytes, none at {request.offset}")
        at, ends = request.offset, min(size, request.offset + request.size) if request.size else size
        fd = os.open(self.layout.path(request.digest), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while at < ends:
                data = await asyncio.to_thread(os.pread, fd, min(_CHUNK, ends - at), at)
                if not data:
                    return
                yield Chunk(offset=at, data=data)
                at += len(data)
        finally:
            os.close(fd)

    async def claim(self, ctx: Context, request: ClaimBlob) -> Claim:
        """A blob's path, and the promise that it stays there for a while."""
        expires = time.time() + request.ttl_seconds
        with self.db.write() as tx:
            size = self._row(ctx.namespace, request.digest)["size"]
            tx.execute("INSERT INTO claims VALUES (?, ?)", (request.digest, expires))
        return Claim(
            digest=request.digest,
            path=str(self.layout.path(request.digest)),
            size=size,
            expires_at=datetime.fromtimestamp(expires, UTC),
        )

    async def delete(self, ctx: Context, request: BlobRequest) -> Empty:
        """Takes a blob from the namespace; its bytes go with the last one. A pull under way keeps what it needs."""
        with self.db.write() as tx:
            self._row(ctx.namespace, request.digest)
            if tx.execute(
                "SELECT 1 FROM holds WHERE key = ? AND namespace = ? AND snapshotter = ''",
                (request.digest, ctx.namespace),
            ).fetchone():
                raise FailedPrecondition(f"blob {request.digest}: a pull under way needs it")
            self.hide(tx, ctx.namespace, request.digest)
            ctx.answer(tx, Empty())
        self.purge()
        return Empty()

    # -------------------------------------------------------------------------------------------------------- within

    def sees(self, namespace: str, digest: str) -> bool:
        """Whether a namespace sees a blob."""
        return self._find(namespace, digest) is not None

    def labels(self, namespace: str, digest: str) -> Labels:
        """A blob's labels in a namespace; none where it isn't seen."""
        row = self._find(namespace, digest)
        return load(row["labels"]) if row is not None else {}

    def open(self, namespace: str, digest: str) -> bytes:
        """All of a small blob. NOT_FOUND where the namespace doesn't see it."""
        self._row(namespace, digest)
        return self.layout.path(digest).read_bytes()

    def path(self, digest: str) -> Path:
        return self.layout.path(digest)

    def share(self, tx: Transaction, namespace: str, digest: str, labels: Labels) -> bool:
        """Shows a namespace a blob that is on the node already; says whether there is one."""
        row = tx.execute("SELECT size FROM blobs WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            return False
        self._show(tx, namespace, digest, row["size"], labels)
        return True

    def add(self, tx: Transaction, namespace: str, file: Path, digest: str, size: int, labels: Labels) -> None:
        """A verified and synced file becomes a blob that the namespace sees."""
        self.layout.place(file, digest)
        tx.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (digest, size))
        self._show(tx, namespace, digest, size, labels)

    def hide(self, tx: Transaction, namespace: str, digest: str) -> bool:
        """Takes a blob from a namespace; says whether it was there. `purge`, afterwards, takes the bytes."""
        gone = tx.execute("DELETE FROM visible WHERE namespace = ? AND digest = ?", (namespace, digest)).rowcount > 0
        if gone:
            tx.emit(namespace, CONTENT_DELETE, ContentDeleted(digest=digest))
        return gone

    def purge(self) -> int:
        """Removes bytes that no namespace sees, no pull holds and no claim protects; says of how many blobs."""
        if self.db.read_one("SELECT 1 FROM unwanted LIMIT 1") is None:
            return 0
        with self.db.write() as tx:
            tx.execute("DELETE FROM claims WHERE expires_at < ?", (time.time(),))
            gone = [row["digest"] for row in tx.execute("SELECT digest FROM unwanted")]
            gone = [digest for digest in gone if not self._claimed(tx, digest)]
            tx.execute("DELETE FROM blobs WHERE digest IN (SELECT value FROM json_each(?))", (json.dumps(gone),))
        # The rows are gone for good before the files are; whoever brought a blob back meanwhile keeps his file.
        with self.db.write() as tx:
            for digest in gone:
                if tx.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchone() is None:
                    self.layout.remove(digest)
        return len(gone)

    @staticmethod
    def _claimed(tx: Transaction, digest: str) -> bool:
        return tx.execute("SELECT 1 FROM claims WHERE digest = ?", (digest,)).fetchone() is not None

    def _show(self, tx: Transaction, namespace: str, digest: str, size: int, labels: Labels) -> None:
        now = time.time()
        made = tx.execute(
            "INSERT OR IGNORE INTO visible VALUES (?, ?, ?, ?, ?)", (namespace, digest, dump(labels), now, now)
        )
        if made.rowcount:
            tx.emit(namespace, CONTENT_CREATE, ContentEvent(digest=digest, size=size))

    def _find(self, namespace: str, digest: str) -> sqlite3.Row | None:
        return self.db.read_one(f"{_SELECT} AND digest = ?", (namespace, digest))

    def _row(self, namespace: str, digest: str) -> sqlite3.Row:
        row = self._find(namespace, digest)
        if row is None:
            raise NotFound(f"blob {digest}: not found")
        return row


_SELECT = "SELECT * FROM visible JOIN blobs USING (digest) WHERE namespace = ?"


def _info(row: sqlite3.Row) -> BlobInfo:
    return BlobInfo(
        digest=row["digest"],
        size=row["size"],
        labels=load(row["labels"]),
        created_at=datetime.fromtimestamp(row["created_at"], UTC),
        updated_at=datetime.fromtimestamp(row["updated_at"], UTC),
    )


def _field(info: BlobInfo, path: Sequence[str]) -> str | None:
    match path:
        case ["digest"]:
            return info.digest
        case ["size"]:
            return str(info.size)
        case _:
            return label_field(info.labels, path)
