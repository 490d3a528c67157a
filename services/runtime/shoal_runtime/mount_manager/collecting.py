"""The mount manager's part in garbage collection: what it tells of activations, and how they are swept.

Within an epoch, whatever is made, relabelled or used is stamped, and isn't swept in it (`shoal_bus.collection`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import structlog
from shoal_bus.api import runtime as api
from shoal_bus.collection import BACK_REFERENCE, Epoch, of_collection
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import Aborted
from shoal_bus.message import unpack

from shoal_runtime.mount_manager.manager import MountManager

log = structlog.get_logger(__name__)

_UNUSED = """
SELECT mounts.* FROM mounts
LEFT JOIN tasks ON tasks.namespace = mounts.namespace AND tasks.id = mounts.name AND tasks.exec_id = ''
WHERE mounts.state = 'made' AND tasks.id IS NULL
"""


def open_epoch(tx: Transaction) -> None:
    """An epoch begins: nothing has been stamped in it."""
    tx.execute("UPDATE mounts SET stamped = 0 WHERE stamped")


class MountCollection:
    """Answers the verbs for it."""

    def __init__(self, database: Database, manager: MountManager) -> None:
        self._db, self._manager = database, manager

    async def mounts(self, ctx: Context, request: Epoch) -> AsyncIterator[api.CollectibleMount]:
        """Activations that may be collected if nothing refers to them. ABORTED where the epoch isn't open."""
        self._check(request.token)
        for row in self._db.read(_UNUSED):
            yield api.CollectibleMount(
                namespace=row["namespace"], name=row["name"], lease=row["lease"],
                labels=of_collection(unpack(row["labels"])),
                created_at=datetime.fromtimestamp(row["created_at"], UTC),
            )  # fmt: skip

    async def sweep(self, ctx: Context, request: api.SweepMounts) -> api.SweptMounts:
        """Takes activations away, those that still may go. ABORTED where the epoch isn't open."""
        swept = []
        for name in request.names:
            self._check(request.token)
            if await self._manager.take_away_unused(request.namespace, name, self._may_go):
                swept.append(name)
        if swept:
            log.info("mounts.collected", namespace=request.namespace, names=swept)
        return api.SweptMounts(names=swept)

    def _may_go(self, row: Any) -> bool:
        """Whether nothing has come to hold an activation since the mark, as far as that is known here."""
        key = (row["namespace"], row["name"])
        if row["stamped"] or not self._db.read(f"{_UNUSED} AND mounts.namespace = ? AND mounts.name = ?", key):
            return False
        prefix = f"{BACK_REFERENCE}container"
        owners = [value for label, value in unpack(row["labels"]).items() if label.startswith(prefix)]
        return not any(
            self._db.read("SELECT 1 FROM containers WHERE namespace = ? AND id = ?", (row["namespace"], owner))
            for owner in owners
        )

    def _check(self, token: str) -> None:
        if self._db.read_one("SELECT 1 FROM collection WHERE token = ? AND open", (token,)) is None:
            raise Aborted("this collection's epoch is no longer open")
