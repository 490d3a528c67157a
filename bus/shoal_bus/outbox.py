"""The outbox's rows, as their relay sees them: pending until the stream has acknowledged them, kept a while after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from shoal_bus.database import Database, Row


@dataclass(frozen=True, order=True)
class EventId:
    """The `Nats-Msg-Id` of an event: `<outbox>.<epoch>.<seq>`. Of one outbox, later events compare higher.

    The epoch is new whenever the database may have gone back: SQLite gives out the sequence numbers of lost rows again.
    """

    outbox: str
    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.outbox}.{self.epoch}.{self.seq}"

    @classmethod
    def parse(cls, text: str) -> EventId | None:
        """The id a message carries, or None if it isn't one of ours."""
        outbox, _, rest = text.partition(".")
        epoch, _, seq = rest.rpartition(".")
        return cls(outbox, epoch, int(seq)) if outbox and epoch and seq.isascii() and seq.isdigit() else None


class Outbox:
    """One database's outbox."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self.id = database.outbox_id

    def id_of(self, row: Row) -> EventId:
        """The id a row is published under."""
        return EventId(self.id, row["epoch"], row["seq"])

    def pending(self, limit: int, after: int = 0) -> list[Row]:
        """The next rows to publish, in order, behind the row `after`."""
        return self._db.read(
            "SELECT seq, epoch, subject, payload FROM outbox WHERE acked_at IS NULL AND seq > ? ORDER BY seq LIMIT ?",
            (after, limit),
        )

    def acknowledge(self, rows: Sequence[tuple[int, int]]) -> None:
        """Records that the stream has rows, each given with its place there."""
        if rows:
            now = time.time()
            with self._db.write() as tx:
                for seq, place in rows:
                    tx.execute("UPDATE outbox SET acked_at = ?, stream_seq = ? WHERE seq = ?", (now, place, seq))

    def settle(self, last: EventId) -> tuple[int, int]:
        """The stream has everything up to `last` and nothing after it. Returns how many rows were unknown, and lost."""
        with self._db.write() as tx:
            published = tx.execute(
                "UPDATE outbox SET acked_at = ? WHERE acked_at IS NULL AND (epoch, seq) <= (?, ?)",
                (time.time(), last.epoch, last.seq),
            ).rowcount
            lost = tx.execute(
                "UPDATE outbox SET acked_at = NULL, stream_seq = NULL"
                " WHERE acked_at IS NOT NULL AND (epoch, seq) > (?, ?)",
                (last.epoch, last.seq),
            ).rowcount
        return published, lost

    def lost_since(self, first_seq: int) -> int:
        """The stream has no event of ours: what it should still hold, from `first_seq` on, it has lost."""
        with self._db.write() as tx:
            return tx.execute(
                "UPDATE outbox SET acked_at = NULL, stream_seq = NULL WHERE acked_at IS NOT NULL AND stream_seq >= ?",
                (max(1, first_seq),),
            ).rowcount

    def oldest_acknowledged(self) -> int:
        """The place in the stream of the oldest row known to have been there; 1 where none is known."""
        row = self._db.read_one("SELECT MIN(stream_seq) FROM outbox")
        return int(row[0] or 1) if row is not None else 1

    def is_new(self) -> bool:
        """Whether nothing of this outbox can be in the stream: this process made it, and has published nothing."""
        return self._db.outbox_is_new and not self._db.read_one(
            "SELECT 1 FROM outbox WHERE acked_at IS NOT NULL LIMIT 1"
        )

    def prune(self, keep_seconds: float) -> None:
        """Drops rows that were acknowledged longer ago.."""
        oldest = self._db.read_one("SELECT acked_at FROM outbox ORDER BY seq LIMIT 1")
        before = time.time() - keep_seconds
        if oldest is not None and oldest[0] is not None and oldest[0] < before:
            with self._db.write() as tx:
                tx.execute("DELETE FROM outbox WHERE acked_at < ?", (before,))
