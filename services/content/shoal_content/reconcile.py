"""What a start mends: files without rows, rows without files, pulls that nobody will finish.

A living copy may be at work. Files come to their places, and go, inside write transactions, and an ingest's row comes
before its file: what is found inside a write transaction is therefore nobody's work under way.
"""

from __future__ import annotations

import structlog
from shoal_bus.database import Database

from shoal_content.blobs.following import Following
from shoal_content.blobs.layout import Layout
from shoal_content.blobs.scrub import Scrub
from shoal_content.transfer.holds import Holds

log = structlog.get_logger(__name__)


def reconcile(database: Database, layout: Layout, holds: Holds, following: Following, scrub: Scrub) -> None:
    """Mends the store, and says what it mended."""
    undo_dead_pulls(holds)
    following.sweep()
    with database.write() as tx:
        lost = tx.execute(
            "DELETE FROM ingests WHERE pull != '' AND pull NOT IN (SELECT id FROM pulls) RETURNING file"
        ).fetchall()
        there = layout.sizes()
        recorded = {row["digest"]: row["size"] for row in tx.execute("SELECT digest, size FROM blobs")}
        placing = {row["placing"] for row in tx.execute("SELECT placing FROM ingests WHERE placing != ''")}
        for digest in there.keys() - recorded.keys() - placing:
            layout.remove(digest)
            log.info("reconcile.blob_without_record", digest=digest)
        for digest, size in recorded.items():
            if there.get(digest) != size:
                scrub.condemn(tx, digest)
        wanted = {row["file"] for row in tx.execute("SELECT file FROM ingests")}
        stray = [file for file in layout.ingest_files() if file not in wanted]
        for file in stray:
            layout.ingest(file).unlink(missing_ok=True)
    scrub.set_aside()
    if stray or lost:
        log.info("reconcile.ingests", files_without_record=len(stray), records_without_pull=len(lost))


def undo_dead_pulls(holds: Holds) -> None:
    """Undoes pulls whose request is over, and whose own undoing failed."""
    for pull in holds.fail_dead():
        log.info("reconcile.pull_undone", pull=pull)
