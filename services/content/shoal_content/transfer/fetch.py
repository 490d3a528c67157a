"""One blob, from a registry into the store: resumed where it broke off, hashed on the way, fetched once at a time.

A namespace fetches what it doesn't see itself, also where another one has it: whoever can name a digest, in a manifest
of his own, must not come to see what it is of. Nor does a registry that is slow for one keep another one waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from shoal_bus.database import Database
from shoal_bus.errors import DataLoss, ShoalError, Unavailable
from shoal_bus.image_reference import Reference
from shoal_bus.locks import Locks
from shoal_bus.types import Descriptor

from shoal_content.blobs.ingests import PULL_REF, Ingests, Whole, Writer
from shoal_content.blobs.store import Store
from shoal_content.registry.resolver import Interrupted, Resolver
from shoal_content.transfer.holds import Holds

log = structlog.get_logger(__name__)

_STALLS = 4
"""How often in a row a registry may break off without having sent another byte."""
_BREAKS = 200
_FLOOR_BYTES, _FLOOR_SECONDS = 60 * 1024, 60.0
"""A registry that sends less in that time is as good as one that sends nothing."""
_SLOW = 2
"""How often it may do so for one blob."""
_FIRST_PAUSE = 0.1


class Fetcher:
    """Brings blobs into the store, for pulls of any namespace."""

    def __init__(self, database: Database, store: Store, ingests: Ingests, holds: Holds, locks: Locks) -> None:
        self._db, self._store, self._ingests, self._holds, self._locks = database, store, ingests, holds, locks

    async def keep(self, pull: str, namespace: str, descriptor: Descriptor, data: bytes) -> None:
        """Stores bytes that are here already, and verified: a manifest's."""
        self._holds.hold_blob(pull, namespace, descriptor.digest)
        async with self._locks.hold(blob_lock(namespace, descriptor.digest)):
            with self._db.write() as tx:
                if self._store.share(tx, namespace, descriptor.digest, {}):
                    return
            path = self._begin(pull, namespace, descriptor)
            await asyncio.to_thread(path.write_bytes, data)
            await self._commit(namespace, descriptor)

    async def fetch(
        self,
        pull: str,
        namespace: str,
        resolver: Resolver,
        reference: Reference,
        descriptor: Descriptor,
        slots: asyncio.Semaphore,
        report: Callable[[int], None],
        begun: Callable[[Path], None] = lambda _: None,
    ) -> bool:
        """Fetches a blob, telling `report` how many bytes have come; says whether it had to be fetched at all.

        It takes one of `slots` while it comes. `begun` is told the file that the bytes come to, and each other one that
        takes its place. Who asks for one that somebody else in the namespace is fetching waits for him. DATA_LOSS when
        the registry's bytes are wrong or end too early, UNAVAILABLE when they come too slowly.
        """
        self._holds.hold_blob(pull, namespace, descriptor.digest)
        async with self._locks.hold(blob_lock(namespace, descriptor.digest)):
            if self._store.sees(namespace, descriptor.digest):
                begun(self._store.path(descriptor.digest))
                return False
            async with slots:
                path = self._begin(pull, namespace, descriptor)
                path.touch(0o600)
                begun(path)
                resumed = await self._download(path, resolver, reference, descriptor, report)
                if resumed is not None:
                    # Bytes from before a power cut may be bad: only what came in one go tells of the registry.
                    log.info("fetch.starting_over", digest=descriptor.digest, found=resumed)
                    path = self._ingests.restart(namespace, _ref(descriptor.digest))
                    path.touch(0o600)
                    begun(path)
                    await self._download(path, resolver, reference, descriptor, report)
            await self._commit(namespace, descriptor)
            return True

    async def _download(
        self,
        path: Path,
        resolver: Resolver,
        reference: Reference,
        descriptor: Descriptor,
        report: Callable[[int], None],
    ) -> str | None:
        """Fills a file up; None when its digest is right, the wrong digest when its first bytes were here before."""
        with await Writer.open(path, descriptor.digest.partition(":")[0]) as writer:
            found = writer.offset
            if found > descriptor.size:
                return writer.digest
            report(found)
            await self._fill(writer, resolver, reference, descriptor, report)
            if writer.digest == descriptor.digest:
                return None
            if found:
                return writer.digest
            raise DataLoss(
                f"{reference}: the registry served wrong bytes for {descriptor.digest}",
                hint=f"their digest is {writer.digest}",
            )

    async def _fill(
        self,
        writer: Writer,
        resolver: Resolver,
        reference: Reference,
        descriptor: Descriptor,
        report: Callable[[int], None],
    ) -> None:
        stalls = breaks = slow = 0
        while writer.offset < descriptor.size:
            before, problem = writer.offset, "ended"
            floor = _Floor(writer.offset)
            try:
                async with resolver.blob(reference, descriptor, writer.offset) as body:
                    skip = writer.offset - body.offset
                    async for chunk in body.chunks:
                        data, skip = chunk[skip:], max(0, skip - len(chunk))
                        if writer.offset + len(data) > descriptor.size:
                            raise DataLoss(
                                f"{reference}: the registry served more than the {descriptor.size} bytes of"
                                f" {descriptor.digest}"
                            )
                        if data:
                            await writer.write(data)
                            report(writer.offset)
                            floor.check(writer.offset)
            except _TooSlow:
                slow += 1
                if slow == _SLOW:
                    raise Unavailable(
                        f"{reference}: the registry sends {descriptor.digest} too slowly: less than"
                        f" {_FLOOR_BYTES} bytes in {_FLOOR_SECONDS:.0f} s",
                        hint="try again later",
                    ) from None
                problem = "came too slowly"
            except Interrupted as error:
                problem = error.message
            if writer.offset == descriptor.size:
                return
            stalls, breaks = (0 if writer.offset > before else stalls + 1), breaks + 1
            if stalls == _STALLS or breaks == _BREAKS:
                raise _truncated(reference, descriptor, writer.offset, problem)
            log.info("fetch.resuming", digest=descriptor.digest, offset=writer.offset, problem=problem)
            await asyncio.sleep(_FIRST_PAUSE * 2**stalls)

    def _begin(self, pull: str, namespace: str, descriptor: Descriptor) -> Path:
        return self._ingests.begin(namespace, _ref(descriptor.digest), descriptor.digest, descriptor.size, pull, {})

    async def _commit(self, namespace: str, descriptor: Descriptor) -> None:
        whole = Whole(namespace, _ref(descriptor.digest), descriptor.digest, descriptor.size)
        await self._ingests.become_blob(whole)


class _TooSlow(Exception):
    """A registry drips."""


class _Floor:
    """Whether the bytes of one response come fast enough."""

    def __init__(self, offset: int) -> None:
        self._since, self._offset = time.monotonic(), offset

    def check(self, offset: int) -> None:
        """Looks once a while has passed; _TooSlow."""
        now = time.monotonic()
        if now - self._since < _FLOOR_SECONDS:
            return
        if offset - self._offset < _FLOOR_BYTES:
            raise _TooSlow
        self._since, self._offset = now, offset


def blob_lock(namespace: str, digest: str) -> str:
    """The lock under which a blob is brought to a namespace."""
    return f"{namespace} blob/{digest}"


def _ref(digest: str) -> str:
    return f"{PULL_REF}{digest}"


def _truncated(reference: Reference, descriptor: Descriptor, offset: int, problem: str) -> ShoalError:
    return DataLoss(
        f"{reference}: {descriptor.digest} is truncated: {offset} of {descriptor.size} bytes came, then {problem}",
        hint="push the image again if trying again doesn't help",
    )
