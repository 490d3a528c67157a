"""A service's SQLite database: its tables, its outbox of events, and the requests it has done.

The row that changes and the event that says so are written in one transaction:

    with db.write() as tx:
        tx.execute("INSERT INTO images …")
        tx.emit("default", IMAGES_CREATE, ImageEvent(name=name))

WAL mode, so that reading never blocks on a writer. `synchronous=NORMAL` loses nothing to a killed process; what must
outlive a power cut is written by `write(durable=True)`, which syncs before it returns.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal_bus import reserve, subjects, wal_index
from shoal_bus.errors import FailedPrecondition, ResourceExhausted
from shoal_bus.events import Topic
from shoal_bus.message import Message, now, pack

Row = sqlite3.Row

BUSY_TIMEOUT_SECONDS = 10.0
LARGEST_EVENT = 512 * 1024
"""Bytes of one event: it has to fit into a message of a server with default limits."""

_BASE = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    epoch      TEXT NOT NULL,
    subject    TEXT NOT NULL,
    payload    BLOB NOT NULL,
    acked_at   REAL,              -- seconds since 1970; NULL while the stream hasn't acknowledged it
    stream_seq INTEGER
);
CREATE INDEX IF NOT EXISTS outbox_pending ON outbox (seq) WHERE acked_at IS NULL;
CREATE TABLE IF NOT EXISTS requests (
    id        TEXT PRIMARY KEY,
    verb      TEXT NOT NULL,
    namespace TEXT NOT NULL,
    lock      TEXT NOT NULL,
    hash      BLOB NOT NULL,
    payload   BLOB NOT NULL,
    headers   BLOB NOT NULL,
    state     TEXT NOT NULL,      -- begun, done, failed
    answer    BLOB,               -- the reply's payload, or the error as msgpack
    progress  BLOB,
    version   INTEGER NOT NULL DEFAULT 0,
    began_at  REAL NOT NULL,
    asked_at  REAL NOT NULL,
    ended_at  REAL
);
CREATE INDEX IF NOT EXISTS requests_begun ON requests (began_at) WHERE state = 'begun';
CREATE INDEX IF NOT EXISTS requests_ended ON requests (ended_at) WHERE state != 'begun';
"""


class Transaction:
    """A write under way: SQL, and the events that go with it."""

    def __init__(self, connection: sqlite3.Connection, node: str, service: str) -> None:
        self._connection, self._node, self._service = connection, node, service
        self._epoch = ""
        self._on_commit: list[Callable[[], None]] = []
        self.emitted = 0

    def execute(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        """One statement of this transaction."""
        return self._connection.execute(sql, parameters)

    def on_commit(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once this transaction has committed, and not at all if it doesn't."""
        self._on_commit.append(callback)

    def emit(self, namespace: str, topic: Topic[Any], payload: Message) -> None:
        """Writes an event into the outbox: it is published if, and only if, this transaction commits."""
        id = str(getattr(payload, topic.id_field)) if topic.id_field else ""
        self.emit_raw(namespace, topic.service, topic.name, id, payload.model_dump(exclude_none=True))

    def emit_raw(self, namespace: str, service: str, topic: str, id: str, payload: dict[str, Any]) -> None:
        """`emit` for a payload that has no model here, as one that a client publishes."""
        if self._service and service != self._service:
            raise ValueError(f"event {topic}: of service {service}, in the outbox of {self._service}")
        if not self._epoch:
            # Another copy may have begun a newer one since this one started; ids have to rise with the rows.
            self._epoch = str(self.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])
        whole_node = namespace in ("", subjects.WHOLE_NODE)
        # As `Event.pack` would: a model of it would be made to be taken apart again.
        event = {
            "node": self._node,
            "namespace": "" if whole_node else namespace,
            "service": service,
            "topic": topic,
            "id": id,
            "timestamp": now(),
            "payload": payload,
        }
        subject = subjects.event(self._node, subjects.WHOLE_NODE if whole_node else namespace, service, topic, id)
        packed = pack(event)
        if len(packed) > LARGEST_EVENT:
            raise ResourceExhausted(f"event {topic} has {len(packed)} bytes, at most {LARGEST_EVENT} are allowed")
        self.execute("INSERT INTO outbox (epoch, subject, payload) VALUES (?, ?, ?)", (self._epoch, subject, packed))
        self.emitted += 1


class Database:
    """One service's database on one node, opened by one of its copies.

    `migrations` are SQL scripts, each run once and in order; a database that has seen more of them than this version
    knows is refused. Calls are synchronous and short: they belong on the event loop's own thread. Where `service` is
    given, the outbox takes events of no other.
    """

    def __init__(self, path: Path, node: str, migrations: Sequence[str] = (), *, service: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.node, self.service = path, node, service
        self._on_emit: list[Callable[[], None]] = []
        try:
            self._open(migrations)
        except sqlite3.OperationalError as error:
            full = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
            if not full or not reserve.give(path):
                raise
            self._open(migrations)
        reserve.take(path)

    def _open(self, migrations: Sequence[str]) -> None:
        wal_index.prepare(self.path)
        self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=BUSY_TIMEOUT_SECONDS)
        self._connection.row_factory = sqlite3.Row
        try:
            self._set_wal()
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute("PRAGMA foreign_keys=ON")
            self._migrate(migrations)
            self.outbox_id, self._epoch = self._begin_epoch()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def read(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query, as of one moment."""
        return self._connection.execute(sql, parameters).fetchall()

    def read_one(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Row | None:
        """The first row of a query, or None."""
        row: sqlite3.Row | None = self._connection.execute(sql, parameters).fetchone()
        return row

    @contextmanager
    def write(self, *, durable: bool = False) -> Iterator[Transaction]:
        """A transaction that commits at the end of the block, or rolls back when it raises. It must not await.

        With `durable`, what it commits is on disk before this returns.
        """
        if durable:
            self._connection.execute("PRAGMA synchronous=FULL")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            transaction = Transaction(self._connection, self.node, self.service)
            try:
                yield transaction
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        finally:
            if durable:
                self._connection.execute("PRAGMA synchronous=NORMAL")
        for callback in transaction._on_commit:
            callback()
        if transaction.emitted:
            for wake in self._on_emit:
                wake()

    def on_emit(self, wake: Callable[[], None]) -> None:
        """Calls `wake` after each transaction that wrote an event."""
        self._on_emit.append(wake)

    def _migrate(self, migrations: Sequence[str]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in _statements(_BASE):
                self._connection.execute(statement)
            row = self._connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
            done = int(row[0]) if row else 0
            if done > len(migrations):
                raise FailedPrecondition(
                    f"{self.path}: written by a newer version (schema {done}, this one knows {len(migrations)})",
                    hint="start the version that wrote it",
                )
            for script in migrations[done:]:
                for statement in _statements(script):
                    self._connection.execute(statement)
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (str(len(migrations)),))
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk has rolled it back already
                self._connection.execute("ROLLBACK")
            raise

    def _begin_epoch(self) -> tuple[str, str]:
        """The outbox's id, and a new epoch: the file may be a copy from earlier, whose sequence numbers come again."""
        with self._transaction() as execute:
            made = execute("INSERT OR IGNORE INTO meta VALUES ('outbox', ?)", (secrets.token_hex(8),))
            self.outbox_is_new = bool(made.rowcount)
            execute("INSERT OR IGNORE INTO meta VALUES ('epoch', '')")
            before = str(execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])
            # Epochs are compared: later ones must sort higher, also when the clock was set back.
            began = max(time.time_ns(), int(before.split("-", maxsplit=1)[0] or 0) + 1)
            epoch = f"{began:020d}-{secrets.token_hex(4)}"
            execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (epoch,))
            outbox = str(execute("SELECT value FROM meta WHERE key = 'outbox'").fetchone()[0])
        return outbox, epoch

    def _set_wal(self) -> None:
        # Turning WAL on needs the file alone, and doesn't wait for that by itself: copies may start at once.
        ends = time.monotonic() + BUSY_TIMEOUT_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection.execute
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one (`executescript` would commit the transaction it finds)."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""
    if pending.strip():
        yield pending
