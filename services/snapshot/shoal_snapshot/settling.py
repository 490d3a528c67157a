"""Unpacked layers on their way to the disk: a pull needn't wait for that, since its blobs are there.

A layer is committed as `unsettled`, in this boot of the host, and settled soon after: the file system is synced once
for all of them, what each takes is counted, and both is written down. A service that is killed meanwhile loses nothing,
since what it wrote is the kernel's; the next copy settles it. After a power cut, which a boot of another id tells, what
wasn't settled can't be trusted: it goes, and is unpacked again when it is wanted. Nothing but such layers lies on one:
whoever prepares a snapshot on it waits until it is settled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog
from shoal_bus.api.snapshot import Usage
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import FailedPrecondition
from shoal_bus.together import in_thread

from shoal_snapshot.records import LOST, Records, Snapshot
from shoal_snapshot.snapshotter import Snapshotter
from shoal_snapshot.syscalls import syncfs

log = structlog.get_logger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LULL_SECONDS, _LONGEST_SECONDS = 0.1, 3.0
"""Settling begins when nothing has been unpacked for so long, and that long after the first layer at the latest."""


def boot_id() -> str:
    """What tells this boot of the host from every other one (random(4))."""
    return _BOOT_ID.read_text().strip()


class Settling:
    """Has the layers that one snapshotter unpacked on disk. `drop` removes a snapshot in a transaction: its record, and
    then its files; FAILED_PRECONDITION while another one lies on it."""

    def __init__(
        self,
        database: Database,
        snapshotter: Snapshotter,
        records: Records,
        drop: Callable[[Transaction, Snapshot], None],
    ) -> None:
        self._db, self._snapshotter, self._records, self._drop = database, snapshotter, records, drop
        self.boot = boot_id()
        self._unpacking, self._unpacked_at = 0, 0.0
        self._at_work = asyncio.Lock()
        self._wanted, self._wanted_since = asyncio.Event(), 0.0

    @contextmanager
    def unpacking(self) -> Iterator[None]:
        """While layers are unpacked, processors and disk are left to that."""
        self._unpacking += 1
        try:
            yield
        finally:
            self._unpacking -= 1
            self._unpacked_at = time.monotonic()

    def soon(self) -> None:
        """Something has been committed that isn't on disk."""
        if not self._wanted.is_set():
            self._wanted_since = time.monotonic()
            self._wanted.set()

    async def run(self) -> None:
        """Settles what there is whenever nothing is unpacked, for ever."""
        while True:
            await self._wanted.wait()
            await self._lull()
            self._wanted.clear()
            await self.settle()

    async def settle(self) -> None:
        """Returns when all that has been committed is on disk; where it can't be, those snapshots go."""
        async with self._at_work:
            unsettled = self._records.unsettled(self.boot)
            if not unsettled:
                return
            try:
                await in_thread(syncfs, str(self._snapshotter.root))
            except OSError as error:
                log.error("settling.failed", snapshotter=self._snapshotter.name, error=str(error))
                with self._db.write() as tx:
                    for snapshot in unsettled:
                        self._records.settle(tx, snapshot, LOST)
                self.drop_lost()
                return
            chains = [(one, self._records.parents(one)) for one in unsettled]
            usages = await in_thread(lambda: [self._usage_of(one, parents) for one, parents in chains])
            with self._db.write(durable=True) as tx:
                for snapshot, usage in zip(unsettled, usages, strict=True):
                    self._records.settle(tx, snapshot, "", usage)

    def drop_lost(self) -> None:
        """Drops what wasn't on disk when the host went down, or couldn't be written. What is being unpacked on it keeps
        it a while."""
        if not self._records.lost(self.boot):
            return
        with self._db.write() as tx:
            for snapshot in self._records.lost(self.boot):
                with suppress(FailedPrecondition):
                    self._drop(tx, snapshot)
                    log.warning("settling.lost", snapshotter=self._snapshotter.name, snapshot=snapshot.key)

    def recover(self) -> None:
        """What earlier copies left: of another boot it is dropped, of this one it is settled soon."""
        self.drop_lost()
        self.soon()

    async def _lull(self) -> None:
        """Returns when nothing has been unpacked for a while, or what is unsettled has been so for long."""
        while True:
            now = time.monotonic()
            lull = not self._unpacking and now - self._unpacked_at > _LULL_SECONDS
            if lull or now - self._wanted_since > _LONGEST_SECONDS:
                return
            await asyncio.sleep(_LULL_SECONDS / 2)

    def _usage_of(self, snapshot: Snapshot, parents: Sequence[int]) -> Usage | None:
        try:
            size, inodes = self._snapshotter.usage(snapshot.id, parents)
        except FileNotFoundError:
            return None  # it is being removed
        return Usage(size=size, inodes=inodes)
