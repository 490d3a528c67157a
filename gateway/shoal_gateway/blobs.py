"""A blob's bytes for a call: from its own file where the gateway is on its node, else over the bus."""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

from shoal_bus.api import content
from shoal_bus.errors import DataLoss, OutOfRange
from shoal_bus.together import in_thread

from shoal_gateway.call import Call

CHUNK = 1 << 20
"""Bytes of one message, as containerd has it."""
CLAIM_SECONDS = 60.0
"""How long a blob's bytes are kept for a call that is under way, once it has said so last."""
_READ_SECONDS = 600.0
_LEFT_SECONDS = 60.0
"""A path that is used again must be there for so long still: as long as a call may take to open it, and much more."""
_KEPT = 1024
_SMALL = 128 << 10


class Readings:
    """Paths by which blobs were read of late: one that is read bit by bit is claimed once, and not for each bit.

    They are claimed for as long as the namespace sees the blob, so that a path that is there says that it may be read.
    """

    def __init__(self) -> None:
        self._taken: OrderedDict[tuple[str, str], tuple[content.Claim, float]] = OrderedDict()

    async def open(self, call: Call, digest: str) -> tuple[int, int] | None:
        """A blob's file, open, and its size. None: the node's file system is another one. NOT_FOUND, DATA_LOSS."""
        key = call.namespace, digest
        claim, until = self._taken.get(key, (None, 0.0))
        if claim is not None and time.monotonic() < until:
            with suppress(FileNotFoundError):
                return os.open(claim.path, os.O_RDONLY | os.O_CLOEXEC), claim.size
        self._taken.pop(key, None)
        # Its time counts from here: from before the service's own.
        until = time.monotonic() + _READ_SECONDS - _LEFT_SECONDS
        wanted = content.ClaimBlob(digest=digest, ttl_seconds=_READ_SECONDS, while_seen=True)
        claim = await call.ask(content.BLOB_CLAIM, wanted)
        try:
            fd = os.open(claim.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        self._taken[key] = claim, until
        while len(self._taken) > _KEPT:
            self._taken.popitem(last=False)
        return fd, claim.size


async def read(call: Call, readings: Readings, wanted: content.ReadBlob) -> AsyncGenerator[tuple[int, bytes], None]:
    """A range of a blob, in pieces with their offsets. NOT_FOUND, OUT_OF_RANGE, DATA_LOSS."""
    opened = await readings.open(call, wanted.digest)
    if opened is None:
        async for chunk in call.items(content.BLOB_READ, wanted):
            yield chunk.offset, chunk.data
        return
    fd, size = opened
    try:
        if wanted.offset > size:
            raise OutOfRange(f"read past object length {size} bytes")
        at, ends = wanted.offset, min(size, wanted.offset + wanted.size) if wanted.size else size
        while at < ends:
            data = await _piece(fd, min(CHUNK, ends - at), at)
            if not data:
                raise DataLoss(f"blob {wanted.digest}: its bytes on this node end at {at}")
            yield at, data
            at += len(data)
    finally:
        os.close(fd)


async def _piece(fd: int, size: int, at: int) -> bytes:
    """What there is at an offset: a little of it at once where it needn't be read from the disk, else in a thread."""
    if size <= _SMALL:
        data = bytearray(size)
        with suppress(OSError):  # EAGAIN: the disk would have to be asked
            if os.preadv(fd, [data], at, os.RWF_NOWAIT) == size:
                return bytes(data)
    return await in_thread(os.pread, fd, size, at)


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
