"""Blobs: the node's bytes, and what each namespace sees of them.

A namespace sees a blob that it wrote or pulled: to know a digest isn't enough, its bytes have to be presented. They are
on disk once, however many namespaces see them. Rows and files change together: a file comes to its place inside a
transaction in which its ingest's row, or the blob's own, says so, and goes in a transaction that finds it unwanted, so
that no two copies of this service ever disagree. An ingest's file is a second link to the same bytes until the blob is
certain to be there.

A blob whose bytes were found damaged stays on record, with its labels: it isn't served (DATA_LOSS), and whoever fetches
or writes it again heals it for every namespace.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from shoal_bus.api.content import (
    CONTENT_CREATE,
    CONTENT_DELETE,
    BlobInfo,
    BlobRequest,
    Chunk,
    ContentDeleted,
    ContentEvent,
    ListBlobs,
    ReadBlob,
    UpdateBlob,
)  # fmt: skip
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import DataLoss, FailedPrecondition, NotFound, OutOfRange
from shoal_bus.filters import compile_filters, label_field
from shoal_bus.message import Empty
from shoal_bus.types import Labels

from shoal_content import media
from shoal_content.blobs.layout import Layout, sync
from shoal_content.labels import dump, load, updated

_PAGE = 500
_CHUNK = 256 * 1024
_PEEK = 64


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
                if matches(partial(_field, info)):
                    yield info
            after = rows[-1]["digest"]
            await asyncio.sleep(0)  # matching takes time, and others wait

    async def read(self, ctx: Context, request: ReadBlob) -> AsyncIterator[Chunk]:
        """A range of a blob's bytes; one that is removed meanwhile is read to its end."""
        size = self.sound(ctx.namespace, request.digest)["size"]
        if request.offset > size:
            raise OutOfRange(f"blob {request.digest}: has {size} bytes, none at {request.offset}")
        at, ends = request.offset, min(size, request.offset + request.size) if request.size else size
        try:
            fd = os.open(self.layout.path(request.digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.sound(ctx.namespace, request.digest)  # somebody else may have removed it, or found it out, meanwhile
            raise unreadable(request.digest, "they are gone") from None
        try:
            while at < ends:
                data = await asyncio.to_thread(_pread, fd, min(_CHUNK, ends - at), at, request.digest)
                yield Chunk(offset=at, data=data)
                at += len(data)
        finally:
            os.close(fd)

    async def update(self, ctx: Context, request: UpdateBlob) -> BlobInfo:
        """Changes the namespace's labels of a blob: all of them, or those that `fields` names."""
        with self.db.write() as tx:
            labels = updated(load(self._row(ctx.namespace, request.digest)["labels"]), request.labels, request.fields)
            tx.execute(
                "UPDATE visible SET labels = ?, updated_at = ? WHERE namespace = ? AND digest = ?",
                (dump(labels), time.time(), ctx.namespace, request.digest),
            )
            told = _info(self._row(ctx.namespace, request.digest))
            ctx.answer(tx, told)
        return told

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
        """Whether a namespace sees a blob, and its bytes are sound: it needn't be fetched or written."""
        row = self._find(namespace, digest)
        return row is not None and not row["rotten"]

    def sound(self, namespace: str, digest: str) -> sqlite3.Row:
        """The record of a blob that can be read. NOT_FOUND where the namespace doesn't see it; DATA_LOSS."""
        row = self._row(namespace, digest)
        if row["rotten"]:
            raise DataLoss(
                f"blob {digest}: its bytes on this node are damaged: {row['rotten']}",
                hint="pull its image, or write it, again",
            )
        return row

    def labels(self, namespace: str, digest: str) -> Labels:
        """A blob's labels in a namespace; none where it isn't seen."""
        row = self._find(namespace, digest)
        return load(row["labels"]) if row is not None else {}

    def open(self, namespace: str, digest: str) -> bytes:
        """All of a small blob. NOT_FOUND where the namespace doesn't see it; DATA_LOSS."""
        self.sound(namespace, digest)
        return self.layout.path(digest).read_bytes()

    def path(self, digest: str) -> Path:
        return self.layout.path(digest)

    def size(self, namespace: str, digest: str) -> int | None:
        """The size of a blob that a namespace sees, or None."""
        row = self._find(namespace, digest)
        return int(row["size"]) if row is not None else None

    def document(self, digest: str) -> bytes | None:
        """All of a blob that looks like JSON; None for any other, and for one that isn't here."""
        try:
            with self.layout.path(digest).open("rb") as blob:
                begin = blob.read(_PEEK)
                return begin + blob.read() if begin.lstrip().startswith(b"{") else None
        except FileNotFoundError:
            return None

    def references(self, digest: str) -> Sequence[str]:
        """What a blob leads to, if it is here, and an index or a manifest."""
        rows = self.db.read("SELECT child FROM blob_references WHERE parent = ?", (digest,))
        return [row["child"] for row in rows]

    def share(self, tx: Transaction, namespace: str, digest: str, labels: Labels) -> bool:
        """Shows a namespace a blob that is on the node already; says whether there is one.

        Only for who has the bytes: a digest says nothing of the right to see what it is of.
        """
        size = self._sound_size(tx, digest)
        if size is None:
            return False
        self._show(tx, namespace, digest, size, labels)
        return True

    def place(self, tx: Transaction, file: Path, digest: str) -> bool:
        """Links a verified and synced file to its place, unless sound bytes are there; says whether it did.

        The row of the file's ingest must say so in the same transaction (`placing`), or the blob's own.
        """
        if self._sound_size(tx, digest) is not None:
            return False
        self.set_aside(tx, digest)
        self.layout.place(file, digest)
        return True

    def unplace(self, tx: Transaction, digest: str, *, by: str = "") -> None:
        """Takes bytes away that were to become a blob, unless they are one, or another ingest than `by` places them."""
        if not tx.execute(
            "SELECT 1 FROM blobs WHERE digest = ?1 UNION ALL SELECT 1 FROM ingests WHERE placing = ?1 AND file != ?2",
            (digest, by),
        ).fetchone():
            self.layout.remove(digest)

    def set_aside(self, tx: Transaction, digest: str) -> None:
        """Takes the damaged bytes of a blob from its place, if it is on record as rotten and they are still there."""
        row = tx.execute("SELECT inode FROM rotten WHERE digest = ?", (digest,)).fetchone()
        if row is not None:
            self.layout.quarantine(digest, row["inode"])

    def add(self, tx: Transaction, namespace: str, file: Path, digest: str, size: int, labels: Labels) -> None:
        """A verified and synced file becomes a blob that the namespace sees. The file itself stays."""
        # Usually `place` has been called, and the directory synced, before this transaction.
        if not self.layout.is_placed(file, digest) and self.place(tx, file, digest):
            sync(self.layout.path(digest).parent)
        if tx.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (digest, size)).rowcount:
            tx.execute(
                "INSERT INTO blob_references SELECT ?, value FROM json_each(?)",
                (digest, json.dumps(self._references(digest, size))),
            )
        tx.execute("DELETE FROM rotten WHERE digest = ?", (digest,))
        self._show(tx, namespace, digest, size, labels)

    def hide(self, tx: Transaction, namespace: str, digest: str) -> bool:
        """Takes a blob from a namespace; says whether it was there. `purge`, afterwards, takes the bytes."""
        gone = tx.execute("DELETE FROM visible WHERE namespace = ? AND digest = ?", (namespace, digest)).rowcount > 0
        if gone:
            self.end_claims_while_seen(tx, digest, namespace)
            tx.emit(namespace, CONTENT_DELETE, ContentDeleted(digest=digest))
        return gone

    def end_claims_while_seen(self, tx: Transaction, digest: str, namespace: str = "") -> None:
        """Takes away the paths by which a namespace, or any, reads a blob without asking whether it still may."""
        rows = tx.execute(
            "DELETE FROM claims WHERE while_seen AND digest = ?1 AND ?2 IN ('', namespace) RETURNING token",
            (digest, namespace),
        ).fetchall()
        for row in rows:
            tx.on_commit(partial((self.layout.claims / row["token"]).unlink, missing_ok=True))

    def purge(self) -> int:
        """Removes bytes that no namespace sees and no pull holds; says how many that were. Claims keep their links."""
        if self.db.read_one("SELECT 1 FROM unwanted LIMIT 1") is None:
            return 0
        with self.db.write() as tx:
            gone = [row["digest"] for row in tx.execute("SELECT digest FROM unwanted")]
            deleted = tx.execute(
                "DELETE FROM blobs WHERE digest IN (SELECT value FROM json_each(?)) RETURNING size", (json.dumps(gone),)
            )
            size = sum(int(row["size"]) for row in deleted.fetchall())
        # The rows are gone for good before the files are; whoever brought a blob back meanwhile keeps his file.
        with self.db.write() as tx:
            for digest in gone:
                self.unplace(tx, digest)
        return size

    def _references(self, digest: str, size: int) -> Sequence[str]:
        """What a blob leads to, if it is an index or a manifest, by its own words alone."""
        if size > media.MAX_MANIFEST_BYTES:
            return []
        data = self.document(digest)
        return media.references(data) if data is not None else []

    @staticmethod
    def _sound_size(tx: Transaction, digest: str) -> int | None:
        row = tx.execute(
            "SELECT size FROM blobs WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM rotten WHERE digest = ?1)",
            (digest,),
        ).fetchone()
        return row["size"] if row is not None else None

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


_SELECT = (
    "SELECT *, coalesce((SELECT problem FROM rotten WHERE rotten.digest = visible.digest), '') AS rotten"
    " FROM visible JOIN blobs USING (digest) WHERE namespace = ?"
)


def _info(row: sqlite3.Row) -> BlobInfo:
    return BlobInfo(
        digest=row["digest"],
        size=row["size"],
        labels=load(row["labels"]),
        created_at=datetime.fromtimestamp(row["created_at"], UTC),
        updated_at=datetime.fromtimestamp(row["updated_at"], UTC),
        rotten=row["rotten"],
    )


def _pread(fd: int, size: int, at: int, digest: str) -> bytes:
    """What of a blob lies at `at`, which is before its end. DATA_LOSS where there is nothing, or it can't be read."""
    try:
        data = os.pread(fd, size, at)
    except OSError as error:
        if error.errno == errno.EIO:
            raise unreadable(digest, f"they can't be read at {at}") from None
        raise
    if not data:
        raise unreadable(digest, f"they end at {at}")
    return data


def unreadable(digest: str, problem: str) -> DataLoss:
    """What is said of a blob whose bytes turn out to be damaged, before a scrub has put that on record."""
    return DataLoss(f"blob {digest}: its bytes on this node are damaged: {problem}", hint="run `shoal content scrub`")


def _field(info: BlobInfo, path: Sequence[str]) -> str | None:
    match path:
        case ["digest"]:
            return info.digest
        case ["size"]:
            return str(info.size)
        case ["rotten"]:
            return info.rotten or None
        case _:
            return label_field(info.labels, path)
