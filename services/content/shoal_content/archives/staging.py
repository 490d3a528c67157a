"""Directories for what an operation makes before it is a blob: one for each, gone with it, whatever becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from pathlib import Path

import structlog
from shoal_bus.database import Database
from shoal_bus.types import Labels

from shoal_content.blobs.layout import sync
from shoal_content.blobs.store import Store
from shoal_content.labels import dump, load
from shoal_content.transfer.holds import Holds

log = structlog.get_logger(__name__)


class Stagings:
    """The directories of one node, on the file system of its blobs. An operation begins in `Holds` before it asks."""

    def __init__(self, root: Path, database: Database, store: Store, holds: Holds) -> None:
        self._root = root / "staging"
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._db, self._store, self._holds = database, store, holds

    async def make(self, operation: str) -> Path:
        """An operation's directory, empty: what a dead copy left in it can't be told from what it was to become."""
        await self.drop(operation)
        path = self._path(operation)
        path.mkdir(mode=0o700)
        return path

    async def drop(self, operation: str) -> None:
        """Removes it, if it is there, with all that is in it."""
        await asyncio.to_thread(shutil.rmtree, self._path(operation), ignore_errors=True)

    async def sweep(self) -> None:
        """Removes those of operations that are over."""
        alive = {self._path(operation).name for operation in self._holds.under_way()}
        # Its operation comes first: what is listed after those, and not among them, is over.
        for path in [path for path in self._root.iterdir() if path.name not in alive]:
            if path.name in {self._path(operation).name for operation in self._holds.under_way()}:
                continue
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
            log.info("staging.removed", directory=path.name)

    async def adopt(
        self, operation: str, namespace: str, file: Path, digest: str, size: int, labels: Labels | None = None
    ) -> None:
        """A file that is known to be what its digest says becomes a blob of the namespace, held by the operation."""
        self._holds.hold_blob(operation, namespace, digest)
        if not self._store.sees(namespace, digest):
            await asyncio.to_thread(sync, file)
            with self._db.write(durable=True) as tx:
                self._store.add(tx, namespace, file, digest, size, labels or {})
        elif labels:
            with self._db.write() as tx:
                where = (namespace, digest)
                row = tx.execute("SELECT labels FROM visible WHERE namespace = ? AND digest = ?", where).fetchone()
                if row is not None and (old := load(row["labels"])) != old | labels:
                    tx.execute(
                        "UPDATE visible SET labels = ? WHERE namespace = ? AND digest = ?", (dump(old | labels), *where)
                    )

    def _path(self, operation: str) -> Path:
        return self._root / hashlib.sha256(operation.encode()).hexdigest()[:32]
