"""Ingests: blobs in the making, resumable after any interruption.

An ingest's row comes before its file, and the file's length is how far it is: nothing else has to be kept in step. One
that starts over gets a new file; the old one is unlinked and never truncated, so that whoever reads along keeps what he
has read. Whoever writes holds a lock of the ingest: the harness's for a client, `fetch.blob_lock` for a pull. So the
refs of the two are kept apart by their prefix.

A client's writer has a session, so that a second one is told instead of mixing its bytes with the first one's; a dead
one is in nobody's way for long. An ingest that no client has touched for a day is garbage. A writer on this node may be
given the file itself, which he locks (flock(2)) as long as he writes: a lock that dies with its holder, and that
whoever commits the ingest, or goes on with it, needs to have had. What he writes is hashed here, as he says how far he
is.

A commit syncs the file, links it to its place under a mark in the row (`placing`), syncs the directory, and then
makes it a blob, in one durable transaction; the ingest's own link goes behind that. Killed anywhere, the ingest is
still there, or the blob is.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import secrets
import sqlite3
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from shoal_bus.api.content import (
    AdvanceIngest,
    IngestRequest,
    IngestStatus,
    ListBlobs,
    OpenIngest,
    ReleaseIngest,
    WriteIngest,
)
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from shoal_bus.filters import compile_filters, label_field
from shoal_bus.message import Empty
from shoal_bus.types import Labels

from shoal_content.blobs.layout import Layout, hash_file, sync
from shoal_content.blobs.store import Store
from shoal_content.labels import dump, load
from shoal_content.leasing import attach

PULL_REF = "pull-"
"""What the refs of pulls begin with. A client's own may not."""

SESSION_SECONDS = 30.0
"""How long a writer may be silent before another one may write to its ingest."""
_DEFAULT_ALGORITHM = "sha256"
_HASHES_KEPT = 256
_BLOCK = 1 << 20


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


class _Hashed(NamedTuple):
    """The hash of the first `size` bytes of a file, which nobody changes."""

    hash: hashlib._Hash
    size: int

    @property
    def digest(self) -> str:
        return f"{self.hash.name}:{self.hash.hexdigest()}"


class Whole(NamedTuple):
    """An ingest that has all of its bytes, whose digest is right."""

    namespace: str
    ref: str
    digest: str
    size: int


class Ingests:
    """The ingests of one node."""

    def __init__(self, database: Database, layout: Layout, store: Store) -> None:
        self._db, self._layout, self._store = database, layout, store
        # By the file's name, which is never used twice: bytes that came through here needn't be read to be hashed.
        self._hashes: OrderedDict[str, _Hashed] = OrderedDict()
        self._whole: list[tuple[Whole, asyncio.Future[None]]] = []
        self._becoming: asyncio.Task[None] | None = None

    # -------------------------------------------------------------------------------------------------------- handlers

    async def open(self, ctx: Context, request: OpenIngest) -> IngestStatus:
        """Begins an ingest, or finds it, for one writer."""
        row = self._find(ctx.namespace, request.ref)
        self._refuse_what_is_there(ctx, None if request.overrule else row, request.expected)
        another = row is not None and request.overrule and 0 not in (row["total"], request.total)
        with self._db.write() as tx:
            self._enter(tx, ctx, request)
        if another and row is not None and row["total"] != request.total:
            self._start_over(ctx, request.ref)
        row = self._row(ctx.namespace, request.ref)
        with self._alone(row):  # it is there now, and nobody else's
            hashed = await asyncio.to_thread(self._hashed, row, _algorithm(request.expected or row["expected"]))
        told = self._status(row, hashed.size).model_copy(
            update={"digest": hashed.digest, "path": str(self._layout.ingest(row["file"])) if request.claim else ""}
        )
        with self._db.write() as tx:
            ctx.answer(tx, told)
        return told

    async def write(self, ctx: Context, request: WriteIngest) -> IngestStatus:
        """Appends a client's bytes, and commits them where asked.

        Up to the record of its answer a repeat finds the same bytes in their place, so it needn't be recorded before.
        """
        row = self._find(ctx.namespace, request.ref)
        if row is None and request.offset:
            raise OutOfRange(f"ingest {request.ref}: is at 0, not at {request.offset}")
        if request.truncate and request.offset:
            raise InvalidArgument(f"ingest {request.ref}: an ingest that is truncated begins at 0")
        self._refuse_what_is_there(ctx, row, request.expected)
        total = 0 if request.overrule else request.total or (row["total"] if row is not None else 0)
        if total and request.offset + len(request.data) > total:
            raise FailedPrecondition(
                f"ingest {request.ref}: {request.offset + len(request.data)} bytes, {total} were announced"
            )
        with self._db.write() as tx:
            self._enter(tx, ctx, request)
        if request.truncate:
            self._start_over(ctx, request.ref)
        row = self._row(ctx.namespace, request.ref)
        with self._alone(row) as fd:
            offset = await asyncio.to_thread(self._append, fd, row, request)
            if request.commit:
                return await self._commit(ctx, request, row)
        told = self._status(row, offset)
        if request.overrule:
            hashed = await asyncio.to_thread(self._hashed, row, _algorithm(request.expected or row["expected"]))
            told = told.model_copy(update={"digest": hashed.digest})
        with self._db.write() as tx:
            ctx.answer(tx, told)
        return told

    async def advance(self, ctx: Context, request: AdvanceIngest) -> Empty:
        """Hashes what a writer has written to the file itself, and keeps others off for a while."""
        with self._db.write() as tx:
            row = self._row(ctx.namespace, request.ref)
            if row["session"] != request.session:
                raise Unavailable(f"ingest {request.ref}: is being written by another writer")
            now = time.time()
            tx.execute(
                "UPDATE ingests SET updated_at = ?, session_until = ? WHERE namespace = ? AND ref = ?",
                (now, now + SESSION_SECONDS, ctx.namespace, request.ref),
            )
        known = self._hashes.get(row["file"])
        algorithm = known.hash.name if known is not None else _algorithm(row["expected"])
        await asyncio.to_thread(self._hashed, row, algorithm, request.offset)
        return Empty()

    async def release(self, ctx: Context, request: ReleaseIngest) -> Empty:
        """A writer lets go of an ingest; one that has lost it to another, or has committed it, has done so already."""
        with self._db.write() as tx:
            self._row(ctx.namespace, request.ref)
            tx.execute(
                "UPDATE ingests SET session = '', session_until = 0 WHERE namespace = ? AND ref = ? AND session = ?",
                (ctx.namespace, request.ref, request.session),
            )
            ctx.answer(tx, Empty())
        return Empty()

    async def status(self, ctx: Context, request: IngestRequest) -> IngestStatus:
        """How far an ingest is."""
        return self._status(self._row(ctx.namespace, request.ref))

    async def list(self, ctx: Context, request: ListBlobs) -> AsyncIterator[IngestStatus]:
        """The ingests of the namespace that match, by their refs."""
        matches = compile_filters(request.filters)
        for row in self._db.read("SELECT * FROM ingests WHERE namespace = ? ORDER BY ref", (ctx.namespace,)):
            status = self._status(row)
            if matches(partial(_field, status)):
                yield status

    async def abort(self, ctx: Context, request: IngestRequest) -> Empty:
        """Drops an ingest; one that a pull is at is the pull's."""
        with self._db.write() as tx:
            row = self._row(ctx.namespace, request.ref)
            if row["pull"]:
                raise FailedPrecondition(f"ingest {request.ref}: belongs to a pull under way", hint="cancel the pull")
            self._remove_file(tx, row)  # before anything is written: a full disk may be the reason
        with self._db.write() as tx:
            self._drop(tx, self._row(ctx.namespace, request.ref))
            ctx.answer(tx, Empty())
        return Empty()

    # ------------------------------------------------------------------------------------------------------ for pulls

    def begin(
        self, namespace: str, ref: str, expected: str, total: int, pull: str, labels: Labels, lease: str = ""
    ) -> Path:
        """The file of an ingest, begun now or before. `pull` takes over one that another pull left."""
        now = time.time()
        with self._db.write() as tx:
            tx.execute(
                f"INSERT OR IGNORE {_INSERT}",
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
            row, file = self._row(namespace, ref), secrets.token_hex(16)
            self._unplace(tx, row)
            tx.execute("UPDATE ingests SET file = ? WHERE namespace = ? AND ref = ?", (file, namespace, ref))
        self._layout.ingest(row["file"]).unlink(missing_ok=True)
        return self._layout.ingest(file)

    async def settle(self, *whole: Whole) -> None:
        """Puts whole and verified ingests on disk, in the places they will have as blobs, so that `commit` is quick."""
        files = [self._layout.ingest(self._row(one.namespace, one.ref)["file"]) for one in whole]
        await asyncio.to_thread(_sync_all, files)
        placed = set()
        with self._db.write() as tx:
            for one, file in zip(whole, files, strict=True):
                tx.execute(
                    "UPDATE ingests SET placing = ? WHERE namespace = ? AND ref = ?",
                    (one.digest, one.namespace, one.ref),
                )
                if self._store.place(tx, file, one.digest):
                    placed.add(self._layout.path(one.digest).parent)
        if placed:
            await asyncio.to_thread(_sync_all, placed)

    async def become_blob(self, whole: Whole) -> None:
        """A whole and verified ingest becomes a blob, and is on disk then. What comes at once shares syncs and commit.

        DATA_LOSS if it isn't whole after all. It goes on to its end when this is cancelled.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._whole.append((whole, done))
        if self._becoming is None:
            self._becoming = asyncio.create_task(self._become_blobs())
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            await asyncio.wait({done})
            done.exception()  # nobody else asks for it
            raise

    async def _become_blobs(self) -> None:
        try:
            while self._whole:
                await asyncio.sleep(0)  # others may be as far
                batch, self._whole = self._whole, []
                await self._become(batch)
        finally:
            self._becoming = None

    async def _become(self, batch: Sequence[tuple[Whole, asyncio.Future[None]]]) -> None:
        try:
            await self.settle(*(whole for whole, _ in batch))
            with self._db.write(durable=True) as tx:
                for whole, _ in batch:
                    self.commit(tx, whole.namespace, whole.ref, whole.digest, whole.size)
        except Exception as error:  # noqa: BLE001 (it is who asked for that who is told)
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for one in batch:  # none has become a blob: each is told of its own error
                await self._become([one])
            return
        for _, done in batch:
            done.set_result(None)

    def commit(self, tx: Transaction, namespace: str, ref: str, digest: str, size: int) -> None:
        """A whole, verified and synced ingest becomes a blob. DATA_LOSS if it isn't whole after all."""
        row = self._row(namespace, ref)
        file = self._layout.ingest(row["file"])
        if (found := file.stat().st_size) != size:
            raise DataLoss(f"ingest {ref}: has {found} bytes, {size} were verified", hint="somebody else wrote to it")
        self._store.add(tx, namespace, file, digest, size, load(row["labels"]))
        self._drop(tx, row)

    def remove_files_of(self, pull: str, condition: Callable[[Transaction], bool] = lambda _: True) -> None:
        """Removes the files of a pull's ingests. Their rows stay, at 0: a full disk may refuse to change them."""
        with self._db.write() as tx:  # it keeps another pull from taking one over meanwhile
            if not condition(tx):
                return
            for row in tx.execute("SELECT * FROM ingests WHERE pull = ?", (pull,)).fetchall():
                self._remove_file(tx, row)

    def _remove_file(self, tx: Transaction, row: sqlite3.Row) -> None:
        file = self._layout.ingest(row["file"])
        if row["placing"] and self._layout.is_placed(file, row["placing"]):
            self._store.unplace(tx, row["placing"], by=row["file"])
        file.unlink(missing_ok=True)

    def drop_of(self, tx: Transaction, pull: str) -> None:
        """Forgets the ingests of a pull that is over; what is left of their files goes once that is certain.

        Also one that succeeded may have some: another pull was faster with a blob, while this one's copy was dead.
        """
        for row in tx.execute("SELECT * FROM ingests WHERE pull = ?", (pull,)).fetchall():
            self._drop(tx, row)

    # ------------------------------------------------------------------------------------------------ for collections

    def drop(self, tx: Transaction, namespace: str, ref: str) -> None:
        """Drops an ingest that nothing holds, and whose lock is held."""
        self._drop(tx, self._row(namespace, ref))

    # --------------------------------------------------------------------------------------------------------- within

    def _refuse_what_is_there(self, ctx: Context, row: sqlite3.Row | None, expected: str | None) -> None:
        """ALREADY_EXISTS for an ingest that would come to a blob which is there: the request's lease has that now."""
        if row is None and expected and self._store.sees(ctx.namespace, expected):
            self._lease(ctx, expected)
            raise AlreadyExists(f"blob {expected}: is there already")

    def _lease(self, ctx: Context, digest: str) -> None:
        """Has the request's lease, if there is one, hold a blob that is there already."""
        if ctx.lease:
            with self._db.write() as tx:
                attach(tx, ctx.namespace, ctx.lease, "content", digest)

    def _enter(self, tx: Transaction, ctx: Context, request: OpenIngest | WriteIngest) -> None:
        """Begins an ingest, or finds it, for the writer of a request, and keeps others off for a while."""
        namespace = ctx.namespace
        if request.ref.startswith(PULL_REF):
            raise InvalidArgument(f"ingest {request.ref}: refs of {PULL_REF}… are for pulls", hint="choose another ref")
        row, now = self._find(namespace, request.ref), time.time()
        expected = "" if request.overrule else request.expected or ""
        total = 0 if request.overrule and isinstance(request, WriteIngest) else request.total
        if row is None:
            file = secrets.token_hex(16)
            tx.execute(
                f"INSERT {_INSERT}",
                (namespace, request.ref, file, total, expected, "", dump(request.labels), now, now),
            )
        else:
            self._check(row, request, expected, now)
            self._unplace(tx, row)
        attach(tx, namespace, ctx.lease, "ingests", request.ref)
        tx.execute(
            "UPDATE ingests SET updated_at = ?, total = coalesce(nullif(?, 0), total),"
            " expected = coalesce(nullif(?, ''), expected),"
            " session = ?, session_until = ? WHERE namespace = ? AND ref = ?",
            (now, total, expected, request.session, now + SESSION_SECONDS if request.session else 0.0,
             namespace, request.ref),
        )  # fmt: skip

    @staticmethod
    def _check(row: sqlite3.Row, request: OpenIngest | WriteIngest, expected: str, now: float) -> None:
        """Whether the writer of a request may go on with an ingest."""
        if row["pull"]:
            raise FailedPrecondition(f"ingest {request.ref}: belongs to a pull under way", hint="choose another ref")
        # A clock that was set back must not keep a dead writer's ingest for longer than any writer gets.
        held = now < row["session_until"] <= now + SESSION_SECONDS
        if row["session"] and row["session"] != request.session and held:
            raise Unavailable(
                f"ingest {request.ref}: is being written by another writer",
                hint=f"if that has gone, try again in {row['session_until'] - now:.0f} s",
            )
        if request.overrule:
            return
        for what, known, given in ("size", row["total"], request.total), ("digest", row["expected"], expected):
            if known and given and known != given:
                raise FailedPrecondition(
                    f"ingest {request.ref}: its {what} was announced as {known}, and now as {given}",
                    hint="abort it, or choose another ref",
                )

    def _unplace(self, tx: Transaction, row: sqlite3.Row) -> None:
        """Undoes what a commit that came to nothing began: the ingest's file may be written to again."""
        if row["placing"]:
            tx.execute("UPDATE ingests SET placing = '' WHERE file = ?", (row["file"],))
            self._store.unplace(tx, row["placing"])

    def _drop(self, tx: Transaction, row: sqlite3.Row) -> None:
        """Removes a row; its file goes once that is certain."""
        where = (row["namespace"], row["ref"])
        tx.execute("DELETE FROM ingests WHERE namespace = ? AND ref = ?", where)
        tx.execute("DELETE FROM lease_resources WHERE namespace = ? AND type = 'ingests' AND id = ?", where)
        if row["placing"]:
            self._store.unplace(tx, row["placing"])
        self._hashes.pop(row["file"], None)
        file = self._layout.ingest(row["file"])
        tx.on_commit(lambda: file.unlink(missing_ok=True))

    @contextmanager
    def _alone(self, row: sqlite3.Row) -> Iterator[int]:
        """An ingest's file, open and locked: no writer who was given it writes to it. UNAVAILABLE."""
        fd = os.open(self._layout.ingest(row["file"]), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Unavailable(f"ingest {row['ref']}: is being written by another writer") from None
        except BaseException:
            os.close(fd)
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    def _start_over(self, ctx: Context, ref: str) -> None:
        with self._alone(self._row(ctx.namespace, ref)):
            self.restart(ctx.namespace, ref)

    def _append(self, fd: int, row: sqlite3.Row, request: WriteIngest) -> int:
        """Writes a request's bytes, as far as they aren't there yet; returns where the ingest ends then."""
        size = os.fstat(fd).st_size
        # A repeat of a request finds some of its bytes there, or all of them.
        there = request.data[: max(0, size - request.offset)]
        ends = request.offset + len(request.data)
        # Nothing may be committed behind what its writer knows of.
        fits = request.offset <= size and (ends >= size or (bool(there) and not request.commit))
        if not fits or (there and os.pread(fd, len(there), request.offset) != there):
            raise OutOfRange(f"ingest {request.ref}: is at {size}, not at {request.offset}", hint="ask how far it is")
        data = memoryview(request.data)[len(there) :]
        try:
            self._write(fd, data, size)
        except OSError:
            os.ftruncate(fd, size)  # nobody reads along with a client's ingest
            raise
        self._hash_on(row["file"], row["expected"], data, size)
        return size + len(data)

    @staticmethod
    def _write(fd: int, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(fd, data, at)
            at, data = at + written, data[written:]
            os.utime(fd, ns=(time.time_ns(),) * 2)  # the kernel's own clock for that may be a tick behind

    def _hash_on(self, file: str, expected: str, data: memoryview, size: int) -> None:
        """Hashes what was written behind `size` bytes, if it was this process that wrote those, too."""
        before = self._hashes.pop(file, None)
        if before is None and not size:
            before = _Hashed(hashlib.new(_algorithm(expected)), 0)
        if before is None or before.size != size:
            return
        before.hash.update(data)
        self._keep(file, _Hashed(before.hash, size + len(data)))

    def _hashed(self, row: sqlite3.Row, algorithm: str, ends: int | None = None) -> _Hashed:
        """The hash of an ingest, up to `ends` or all of it: what isn't hashed yet is read again, in a thread."""
        known = self._hashes.pop(row["file"], None)
        if known is None or known.hash.name != algorithm:
            known = _Hashed(hashlib.new(algorithm), 0)
        with self._layout.ingest(row["file"]).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends = size if ends is None else min(size, ends)
            if known.size > ends:
                known = _Hashed(hashlib.new(algorithm), 0)
            at = file.seek(known.size)
            while at < ends and (block := file.read(min(_BLOCK, ends - at))):
                known.hash.update(block)
                at += len(block)
        hashed = _Hashed(known.hash, at)
        self._keep(row["file"], hashed)
        return hashed

    def _keep(self, file: str, hashed: _Hashed) -> None:
        self._hashes[file] = hashed
        while len(self._hashes) > _HASHES_KEPT:
            self._hashes.popitem(last=False)

    async def _commit(self, ctx: Context, request: WriteIngest, row: sqlite3.Row) -> IngestStatus:
        expected, total = row["expected"], row["total"]
        if request.overrule:
            expected, total = request.expected or "", request.total
            if expected and self._store.sees(ctx.namespace, expected):
                with self._db.write() as tx:
                    attach(tx, ctx.namespace, ctx.lease, "content", expected)
                    self._drop(tx, row)
                raise AlreadyExists(f"blob {expected}: is there already")
        hashed = await asyncio.to_thread(self._hashed, row, _algorithm(expected))
        digest, size = hashed.digest, hashed.size
        if total and size != total:
            raise FailedPrecondition(f"ingest {request.ref}: has {size} bytes, {total} were announced")
        if expected and digest != expected:
            raise FailedPrecondition(f"ingest {request.ref}: its digest is {digest}, {expected} was announced")
        if not self._store.sees(ctx.namespace, digest):
            await self.settle(Whole(ctx.namespace, request.ref, digest, size))
        told = self._status(row, size).model_copy(update={"committed": digest})
        with self._db.write(durable=True) as tx:
            # Another ingest may have been faster with the same bytes.
            already = self._store.sees(ctx.namespace, digest)
            attach(tx, ctx.namespace, ctx.lease, "content", digest)
            if already:
                self._drop(tx, self._row(ctx.namespace, request.ref))
            else:
                tx.execute(
                    "UPDATE ingests SET labels = ? WHERE namespace = ? AND ref = ?",
                    (dump(load(row["labels"]) | request.labels), ctx.namespace, request.ref),
                )
                self.commit(tx, ctx.namespace, request.ref, digest, size)
                if not ctx.lease:
                    where = (ctx.namespace, digest, time.time())
                    tx.execute("INSERT OR REPLACE INTO unleased VALUES (?, ?, ?)", where)
                ctx.answer(tx, told)
        if already:
            raise AlreadyExists(f"blob {digest}: is there already")
        return told

    def _status(self, row: sqlite3.Row, offset: int | None = None) -> IngestStatus:
        """It was updated when bytes were last written, whoever has opened it since: the row's time keeps it alive."""
        size, written = 0, 0.0
        with suppress(FileNotFoundError):
            found = self._layout.ingest(row["file"]).stat()
            size, written = found.st_size, found.st_mtime
        return IngestStatus(
            ref=row["ref"],
            offset=size if offset is None else offset,
            total=row["total"],
            expected=row["expected"],
            labels=load(row["labels"]),
            started_at=datetime.fromtimestamp(row["started_at"], UTC),
            updated_at=datetime.fromtimestamp(max(row["started_at"], written), UTC),
        )

    def _find(self, namespace: str, ref: str) -> sqlite3.Row | None:
        return self._db.read_one("SELECT * FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref))

    def _row(self, namespace: str, ref: str) -> sqlite3.Row:
        row = self._find(namespace, ref)
        if row is None:
            raise NotFound(f"ingest {ref}: not found")
        return row


_INSERT = (
    "INTO ingests (namespace, ref, file, total, expected, pull, labels, started_at, updated_at)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


def _sync_all(paths: Iterable[Path]) -> None:
    for path in paths:
        sync(path)


def _algorithm(expected: str) -> str:
    return expected.partition(":")[0] or _DEFAULT_ALGORITHM


def _field(status: IngestStatus, path: Sequence[str]) -> str | None:
    """What containerd's filters find of an ingest; what it hasn't got isn't there."""
    match path:
        case ["ref" | "expected" as name]:
            return getattr(status, name) or None
        case ["offset" | "total" as name]:
            return str(getattr(status, name))
        case _:
            return label_field(status.labels, path)
