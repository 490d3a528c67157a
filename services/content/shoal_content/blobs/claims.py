"""Claim checks: paths by which whoever is on this node reads a blob, without its bytes passing through the bus.

A claim is a hard link under a name that can't be guessed. Knowing a digest therefore gives nobody the bytes of a blob
that another namespace has, and the bytes stay until the claim expires, whatever becomes of the blob. A namespace has
one claim for each blob, which a later request prolongs; and one of another kind, which goes in the transaction that
takes the blob from the namespace, or finds it damaged (`Store.end_claims_while_seen`).
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from datetime import UTC, datetime

import structlog
from shoal_bus.api.content import Claim, ClaimBlob
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import ResourceExhausted

from shoal_content.blobs.layout import Layout
from shoal_content.blobs.store import Store, unreadable

log = structlog.get_logger(__name__)


class Claims:
    """The claims of one node."""

    def __init__(self, database: Database, layout: Layout, store: Store) -> None:
        self._db, self._layout, self._store = database, layout, store

    async def claim(self, ctx: Context, request: ClaimBlob) -> Claim:
        """A path to a blob's bytes, and the promise that they stay there for a while."""
        return self.take(ctx.namespace, request.digest, request.ttl_seconds, while_seen=request.while_seen)

    def take(self, namespace: str, digest: str, seconds: float, *, while_seen: bool = False) -> Claim:
        """Claims a blob that the namespace sees, for so long at least. NOT_FOUND, DATA_LOSS."""
        wanted = time.time() + seconds
        with self._db.write() as tx:
            size = self._store.sound(namespace, digest)["size"]
            row = tx.execute(
                "SELECT * FROM claims WHERE namespace = ? AND digest = ? AND while_seen = ?",
                (namespace, digest, while_seen),
            ).fetchone()
            if row is not None and self._layout.is_placed(self._layout.claims / row["token"], digest):
                token, expires = row["token"], max(wanted, row["expires_at"])
                tx.execute("UPDATE claims SET expires_at = ? WHERE token = ?", (expires, token))
            else:
                token, expires = secrets.token_hex(24), wanted
                if row is not None:  # the blob's bytes are others by now: it was damaged, and fetched again
                    self._drop(tx, row["token"])
                tx.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?)", (namespace, digest, token, expires, while_seen))
                self._link(digest, token)
        return Claim(
            digest=digest,
            path=str(self._layout.claims / token),
            size=size,
            expires_at=datetime.fromtimestamp(expires, UTC),
        )

    def expire(self, now: float | None = None) -> None:
        """Removes the claims whose time is up."""
        now = time.time() if now is None else now
        if self._db.read_one("SELECT 1 FROM claims WHERE expires_at < ? LIMIT 1", (now,)) is None:
            return
        with self._db.write() as tx:
            for row in tx.execute("SELECT token FROM claims WHERE expires_at < ?", (now,)).fetchall():
                self._drop(tx, row["token"])

    def reconcile(self) -> None:
        """Removes links without a record, which a kill left."""
        with self._db.write() as tx:
            known = {row["token"] for row in tx.execute("SELECT token FROM claims")}
            stray = [entry for entry in os.scandir(self._layout.claims) if entry.name not in known]
            for entry in stray:
                os.unlink(entry.path)  # noqa: PTH108 (an entry of a scan)
        if stray:
            log.info("reconcile.claims_without_record", count=len(stray))
        self.expire()

    def _link(self, digest: str, token: str) -> None:
        try:
            os.link(self._layout.path(digest), self._layout.claims / token)
        except FileNotFoundError:
            raise unreadable(digest, "they are gone") from None
        except OSError as error:
            if error.errno == errno.EMLINK:
                raise ResourceExhausted(f"blob {digest}: too many namespaces claim it", hint="try again") from None
            raise

    def _drop(self, tx: Transaction, token: str) -> None:
        tx.execute("DELETE FROM claims WHERE token = ?", (token,))
        path = self._layout.claims / token
        tx.on_commit(lambda: path.unlink(missing_ok=True))
