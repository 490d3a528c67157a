"""One blob, from a registry into the store: resumed where it broke off, hashed on the way, fetched once at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog
from shoal_bus.database import Database
from shoal_bus.errors import DataLoss, ShoalError
from shoal_bus.locks import Locks
from shoal_bus.types import Descriptor

from shoal_content.holds import Holds
from shoal_content.ingests import Ingests, Writer
from shoal_content.reference import Reference
from shoal_content.registry.resolver import Interrupted, Resolver
from shoal_content.store import Store

log = structlog.get_logger(__name__)

_STALLS = 4
"""How often in a row a registry may break off without having sent another byte."""
_BREAKS = 200
_FIRST_PAUSE = 0.1


class Fetcher:
    """Brings blobs into the store, for pulls of any namespace."""

    def __init__(self, database: Database, store: Store, ingests: Ingests, holds: Holds, locks: Locks) -> None:
        self._db, self._store, self._ingests, self._holds, self._locks = database, store, ingests, holds, locks

    async def keep(self, pull: str, namespace: str, descriptor: Descriptor, data: bytes) -> None:
        """Stores bytes that are here already, and verified: a manifest's."""
        self._holds.hold_blob(pull, namespace, descriptor.digest)
        async with self._locks.hold(blob_lock(descriptor.digest)):
            if self._share(namespace, descriptor.digest):
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
        report: Callable[[int], None],
    ) -> bool:
        """Fetches a blob, telling `report` how many bytes have come; says whether it had to be fetched at all.

        Who asks for one that somebody else is fetching waits for him. DATA_LOSS when the registry's bytes are wrong or
        end too early.
        """
        self._holds.hold_blob(pull, namespace, descriptor.digest)
        async with self._locks.hold(blob_lock(descriptor.digest)):
            if self._share(namespace, descriptor.digest):
                return False
            path = self._begin(pull, namespace, descriptor)
            resumed = await self._download(path, resolver, reference, descriptor, report)
            if resumed is not None:
                # Bytes from before a power cut may be bad: only what came in one go tells of the registry.
                log.info("fetch.starting_over", digest=descriptor.digest, found=resumed)
                path = self._ingests.restart(namespace, _ref(descriptor.digest))
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
        stalls = breaks = 0
        while writer.offset < descriptor.size:
            before, problem = writer.offset, "ended"
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
            except Interrupted as error:
                problem = error.message
            if writer.offset == descriptor.size:
                return
            stalls, breaks = (0 if writer.offset > before else stalls + 1), breaks + 1
            if stalls == _STALLS or breaks == _BREAKS:
                raise _truncated(reference, descriptor, writer.offset, problem)
            log.info("fetch.resuming", digest=descriptor.digest, offset=writer.offset, problem=problem)
            await asyncio.sleep(_FIRST_PAUSE * 2**stalls)

    def _share(self, namespace: str, digest: str) -> bool:
        with self._db.write() as tx:
            return self._store.share(tx, namespace, digest, {})

    def _begin(self, pull: str, namespace: str, descriptor: Descriptor) -> Path:
        return self._ingests.begin(namespace, _ref(descriptor.digest), descriptor.digest, descriptor.size, pull, {})

    async def _commit(self, namespace: str, descriptor: Descriptor) -> None:
        await self._ingests.settle(namespace, _ref(descriptor.digest), descriptor.digest)
        with self._db.write(durable=True) as tx:
            self._ingests.commit(tx, namespace, _ref(descriptor.digest), descriptor.digest, descriptor.size)


def blob_lock(digest: str) -> str:
    """The lock under which a blob is brought to this node, whatever the namespace."""
    return f"blob {digest}"


def _ref(digest: str) -> str:
    return f"pull-{digest}"


def _truncated(reference: Reference, descriptor: Descriptor, offset: int, problem: str) -> ShoalError:
    return DataLoss(
        f"{reference}: {descriptor.digest} is truncated: {offset} of {descriptor.size} bytes came, then {problem}",
        hint="push the image again if trying again doesn't help",
    )
