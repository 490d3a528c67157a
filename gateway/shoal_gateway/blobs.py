"""A blob's bytes for a call: from its own file where the gateway is on its node, else over the bus."""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from shoal_bus.api import content
from shoal_bus.errors import DataLoss, OutOfRange

from shoal_gateway.call import Call

CHUNK = 1 << 20
"""Bytes of one message, as containerd has it."""
SMALL = 64 << 10
"""A range that isn't larger comes over the bus: one question, and nothing to claim."""
CLAIM_SECONDS = 60.0
_LEFT_SECONDS = 20.0
"""A claim that is to be used again must last for so long: as long as a service may take to say that it may be used."""
_KEPT = 256


class Claims:
    """The claims that were taken of late. A blob that is read bit by bit needs one, and not one for each bit.

    They say nothing of the right to read: that is asked for each time.
    """

    def __init__(self) -> None:
        self._taken: OrderedDict[tuple[str, str], tuple[content.Claim, float]] = OrderedDict()

    async def take(self, call: Call, digest: str) -> content.Claim:
        """A path to a blob that the call's namespace has, for a while. NOT_FOUND, DATA_LOSS."""
        key = call.namespace, digest
        taken = self._taken.get(key)
        if taken is not None and time.monotonic() < taken[1]:
            info = await call.ask(content.BLOB_INFO, content.BlobRequest(digest=digest))
            if not info.rotten:
                return taken[0]
        # Its time counts from here: from before the service's own.
        until = time.monotonic() + CLAIM_SECONDS - _LEFT_SECONDS
        claim = await call.ask(content.BLOB_CLAIM, content.ClaimBlob(digest=digest, ttl_seconds=CLAIM_SECONDS))
        self._taken[key] = claim, until
        self._taken.move_to_end(key)
        while len(self._taken) > _KEPT:
            self._taken.popitem(last=False)
        return claim

    def forget(self, call: Call, digest: str) -> None:
        """A claim that turned out to be of no use."""
        self._taken.pop((call.namespace, digest), None)


async def read(call: Call, claims: Claims, wanted: content.ReadBlob) -> AsyncGenerator[tuple[int, bytes], None]:
    """A range of a blob, in pieces with their offsets. NOT_FOUND, OUT_OF_RANGE, DATA_LOSS."""
    if not 0 < wanted.size <= SMALL:
        claim = await claims.take(call, wanted.digest)
        if wanted.offset > claim.size:
            raise OutOfRange(f"read past object length {claim.size} bytes")
        try:
            fd = os.open(claim.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            claims.forget(call, wanted.digest)  # the node's file system is another one, or the claim is over
        else:
            async with aclosing(_file(fd, claim, wanted)) as pieces:
                async for piece in pieces:
                    yield piece
            return
    async for chunk in call.items(content.BLOB_READ, wanted):
        yield chunk.offset, chunk.data


async def _file(fd: int, claim: content.Claim, wanted: content.ReadBlob) -> AsyncGenerator[tuple[int, bytes], None]:
    at, ends = wanted.offset, min(claim.size, wanted.offset + wanted.size) if wanted.size else claim.size
    try:
        while at < ends:
            data = await asyncio.to_thread(os.pread, fd, min(CHUNK, ends - at), at)
            if not data:
                raise DataLoss(f"blob {claim.digest}: its bytes on this node end at {at}")
            yield at, data
            at += len(data)
    finally:
        os.close(fd)


@asynccontextmanager
async def claimed(call: Call, digest: str) -> AsyncIterator[content.Claim]:
    """A path to a blob for as long as a block takes, for whoever else is on its node. NOT_FOUND, DATA_LOSS."""
    taking = content.ClaimBlob(digest=digest, ttl_seconds=CLAIM_SECONDS)
    claim = await call.ask(content.BLOB_CLAIM, taking)

    async def prolong() -> None:
        while True:
            await asyncio.sleep(CLAIM_SECONDS / 3)
            await call.ask(content.BLOB_CLAIM, taking)

    prolonging = asyncio.create_task(prolong())
    try:
        yield claim
    finally:
        prolonging.cancel()
        await asyncio.gather(prolonging, return_exceptions=True)
