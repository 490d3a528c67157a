"""Requests done once by their id, whichever copy they reach, and whichever copy dies in the middle.

The id, a hash of the payload and the intent (the payload itself) are committed before the first effect, under a lock
that dies with its holder. Whoever then holds that lock and finds a request `begun` knows that its owner is dead, and
finishes what it began: the handler is called again with `resumed`.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shoal_bus import wire
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import Code, InvalidArgument, ShoalError, from_wire
from shoal_bus.message import pack, unpack

KEEP_SECONDS = 900.0
"""How long an answer is kept for a repeat."""
TRANSIENT = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.ABORTED})
"""Errors that aren't an answer: a repeat tries again."""

_KEPT_HEADERS = (wire.TRACEPARENT, wire.TRACESTATE, wire.LEASE)

State = Literal["begun", "done", "failed"]


@dataclass(frozen=True)
class Recorded:
    """A request as the database has it."""

    id: str
    verb: str
    namespace: str
    lock: str
    payload: bytes
    headers: dict[str, str]
    state: State
    answer: bytes
    progress: bytes
    version: int
    asked_at: float

    def outcome(self) -> bytes | None:
        """The reply's payload, or None while there is none; raises the error it ended with."""
        if self.state == "failed":
            raise self.error()
        return self.answer if self.state == "done" else None

    def error(self) -> ShoalError:
        """The error a failed request ended with."""
        code, message, hint = unpack(self.answer)
        return from_wire(code, message, hint)


@dataclass(frozen=True)
class Intent:
    """A request that nothing was done for yet, as it will be recorded."""

    id: str
    verb: str
    namespace: str
    lock: str
    payload: bytes
    headers: Mapping[str, str]


class Requests:
    """The requests one service has begun and done on this node."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def find(self, id: str, verb: str, namespace: str, payload: bytes) -> Recorded | None:
        """The request of that id; INVALID_ARGUMENT if the id was used for another one."""
        row = self._db.read_one("SELECT * FROM requests WHERE id = ?", (id,))
        return _checked(row, verb, namespace, payload)

    def get(self, id: str) -> Recorded | None:
        """The request of that id, whatever it was."""
        row = self._db.read_one("SELECT * FROM requests WHERE id = ?", (id,))
        return _recorded(row) if row is not None else None

    def look(self, id: str, verb: str, namespace: str, payload: bytes, lock: str) -> tuple[Recorded | None, bool]:
        """What `find` returns, and whether others are begun under `lock`, which is held: their owners are dead."""
        rows = self._db.read(
            "SELECT * FROM requests WHERE id = ?1"
            " UNION ALL SELECT * FROM requests WHERE state = 'begun' AND lock = ?2 AND id != ?1",
            (id, lock),
        )
        found = next((row for row in rows if row["id"] == id), None)
        return _checked(found, verb, namespace, payload), len(rows) > (found is not None)

    def begin(self, intent: Intent) -> None:
        """Commits the intent."""
        with self._db.write() as tx:
            self.record(tx, intent)

    def record(
        self, tx: Transaction, intent: Intent, answer: bytes | None = None, *, state: State | None = None
    ) -> None:
        """Records a request as begun, or with its answer as done, or as `state` says."""
        now = time.time()
        state = state or ("begun" if answer is None else "done")
        kept = {name: intent.headers[name] for name in _KEPT_HEADERS if name in intent.headers}
        tx.execute(
            "INSERT INTO requests"
            " (id, verb, namespace, lock, hash, payload, headers, state, answer, version, began_at, asked_at, ended_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?, ?, ?)",
            (intent.id, intent.verb, intent.namespace, intent.lock,
             fingerprint(intent.verb, intent.namespace, intent.payload), intent.payload if state == "begun" else b"",
             pack(kept), state, answer, now, now, None if state == "begun" else now),
        )  # fmt: skip

    def finish(self, tx: Transaction, id: str, answer: bytes) -> None:
        """Records the reply, in the transaction of the change itself where there is one."""
        tx.execute(
            "UPDATE requests SET state = 'done', answer = ?, ended_at = ?, payload = x'' "
            "WHERE id = ? AND state = 'begun'",
            (answer, time.time(), id),
        )

    def fail(self, id: str, error: ShoalError, *, keep: bool = False, intent: Intent | None = None) -> None:
        """Records the error. One that is no answer is forgotten, so that a repeat tries again, unless `keep`.

        `intent` is given for a request that isn't recorded yet.
        """
        answer = pack([error.code.name, error.message, error.hint])
        if intent is not None:
            if error.code not in TRANSIENT:
                with self._db.write() as tx:
                    self.record(tx, intent, answer, state="failed")
            return
        with self._db.write() as tx:
            if error.code in TRANSIENT and not keep:
                tx.execute("DELETE FROM requests WHERE id = ? AND state = 'begun'", (id,))
            else:
                tx.execute(
                    "UPDATE requests SET state = 'failed', answer = ?, ended_at = ? WHERE id = ? AND state = 'begun'",
                    (answer, time.time(), id),
                )

    def forget(self, id: str) -> None:
        """Forgets a failed request, so that it may be tried again."""
        with self._db.write() as tx:
            tx.execute("DELETE FROM requests WHERE id = ? AND state = 'failed'", (id,))

    def begun(self, lock: str = "") -> list[Recorded]:
        """The requests without an outcome, oldest first; those under one lock where it is given."""
        if lock:
            rows = self._db.read("SELECT * FROM requests WHERE state = 'begun' AND lock = ? ORDER BY began_at", (lock,))
        else:
            rows = self._db.read("SELECT * FROM requests WHERE state = 'begun' ORDER BY began_at")
        return [_recorded(row) for row in rows]

    def progress(self, id: str, version: int, payload: bytes) -> None:
        """Records how far an operation is, for callers whom another copy answers."""
        with self._db.write() as tx:
            tx.execute("UPDATE requests SET progress = ?, version = ? WHERE id = ?", (payload, version, id))

    def asked(self, id: str) -> None:
        """Records that somebody still wants an operation's outcome."""
        with self._db.write() as tx:
            tx.execute("UPDATE requests SET asked_at = ? WHERE id = ?", (time.time(), id))

    def prune(self) -> None:
        """Drops answers that nobody will ask for again."""
        old = time.time() - KEEP_SECONDS
        if self._db.read_one("SELECT 1 FROM requests WHERE state != 'begun' AND ended_at < ? LIMIT 1", (old,)):
            with self._db.write() as tx:
                tx.execute("DELETE FROM requests WHERE state != 'begun' AND ended_at < ?", (old,))


def fingerprint(verb: str, namespace: str, payload: bytes) -> bytes:
    """What tells one request from another under the same id."""
    return hashlib.blake2b(f"{verb}\0{namespace}\0".encode() + payload, digest_size=16).digest()


def _checked(row: sqlite3.Row | None, verb: str, namespace: str, payload: bytes) -> Recorded | None:
    if row is not None and row["hash"] != fingerprint(verb, namespace, payload):
        raise InvalidArgument(
            f"request id {row['id']}: already used for another request", hint="ids are for one request"
        )
    return _recorded(row) if row is not None else None


def _recorded(row: sqlite3.Row) -> Recorded:
    return Recorded(
        id=row["id"],
        verb=row["verb"],
        namespace=row["namespace"],
        lock=row["lock"],
        payload=row["payload"],
        headers=unpack(row["headers"]),
        state=row["state"],
        answer=row["answer"] or b"",
        progress=row["progress"] or b"",
        version=row["version"],
        asked_at=row["asked_at"],
    )
