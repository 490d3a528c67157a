"""Blobs of any size over the bus, for clients that don't share the node's file system.

    with path.open("rb") as file:
        digest = await upload(client, file, labels={"app": "web"})
    async for data in download(client, digest):
        ...

Neither holds more than a few messages' worth in memory, and both go on where they were when the service is killed and
comes back. An upload is an ingest (`ref`): one that was broken off, by a client that died, is gone on with by the next
upload under its ref, which sends only what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Protocol

from shoal_bus import wire
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.errors import AlreadyExists, DataLoss, FailedPrecondition, OutOfRange, ShoalError, Unavailable
from shoal_bus.types import Labels

WINDOW = 4
"""Messages of an upload under way at once."""
PATIENCE_SECONDS = 30.0
"""How long either waits for a service that isn't there."""
_LARGEST = 512 * 1024
_OVERHEAD = 2048
"""What a message takes besides its data."""
_STALLS = 5
"""How often in a row a download may break off without another byte."""
_PAUSE_SECONDS = 0.2


class Readable(Protocol):
    """Where an upload's bytes come from: a file, or a pipe. It is read in a thread."""

    def read(self, size: int, /) -> bytes | None: ...


async def upload(
    client: Client,
    source: Readable,
    *,
    ref: str = "",
    total: int = 0,
    expected: str = "",
    algorithm: str = "sha256",
    labels: Labels | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> str:
    """Writes what `source` has, from its beginning to its end, as a blob; returns its digest.

    A blob that is there already is no error, and gets the labels. Where there is an ingest `ref`, only what is missing
    of it is sent; one without a ref is dropped when it fails. `expected` is compared (FAILED_PRECONDITION), and so is
    the number of bytes with `total`. UNAVAILABLE while another writer is at the ingest. `on_progress` is told how many
    bytes are there.
    """
    uploading = _Upload(client, ref or f"upload-{secrets.token_hex(12)}", total, expected, labels or {}, on_progress)
    try:
        digest = await uploading.run(source, expected.partition(":")[0] or algorithm)
    except AlreadyExists:
        # Since before we began, or another writer was faster. The service keeps no ingest then.
        digest = uploading.digest or expected
        if labels:
            fields = [f"labels.{key}" for key in labels]
            await client.call(
                content.BLOB_UPDATE, content.UpdateBlob(digest=digest, labels=labels, fields=fields),
                patience=PATIENCE_SECONDS,
            )  # fmt: skip
    except BaseException:
        await uploading.end(drop=not ref)
        raise
    return digest


class _Upload:
    def __init__(
        self,
        client: Client,
        ref: str,
        total: int,
        expected: str,
        labels: Labels,
        on_progress: Callable[[int], object] | None,
    ) -> None:
        self._client, self._ref, self._total, self._labels = client, ref, total, labels
        self._expected, self._on_progress = expected or None, on_progress
        self._session = secrets.token_hex(16)
        self._size = max(1024, min(client.connection.max_payload - wire.HEADROOM - _OVERHEAD, _LARGEST))
        self._sending: deque[asyncio.Task[None]] = deque()
        self.digest = ""

    async def run(self, source: Readable, algorithm: str) -> str:
        opened = await self._client.call(
            content.INGEST_OPEN,
            content.OpenIngest(
                ref=self._ref, session=self._session, total=self._total, expected=self._expected, labels=self._labels
            ),
            patience=PATIENCE_SECONDS,
        )
        hashed, at, there = hashlib.new(algorithm), 0, opened.offset
        try:
            while data := await asyncio.to_thread(_next, source, self._size, hashed):
                if at + len(data) > there:
                    await self._send(max(at, there), data[max(0, there - at) :])
                at += len(data)
            while self._sending:
                await self._sending.popleft()
        finally:
            await self._stop()
        if at < there:
            raise FailedPrecondition(
                f"ingest {self._ref}: has {there} bytes, and what is uploaded {at}", hint="it is of something else"
            )
        self.digest = f"{algorithm}:{hashed.hexdigest()}"
        return await self._commit(at)

    async def _send(self, offset: int, data: bytes) -> None:
        """Sends a piece, once there is room in the window."""
        while len(self._sending) >= WINDOW:
            await self._sending.popleft()
        before = self._sending[-1] if self._sending else None
        self._sending.append(asyncio.create_task(self._write(offset, data, before)))

    async def _write(self, offset: int, data: bytes, before: asyncio.Task[None] | None) -> None:
        request = content.WriteIngest(ref=self._ref, offset=offset, data=data, session=self._session)
        try:
            await self._client.call(content.INGEST_WRITE, request, timeout=None, patience=PATIENCE_SECONDS)
        except OutOfRange:
            # Another copy of the service has what comes before, and is at it still.
            if before is None:
                raise
            await asyncio.shield(before)
            await self._client.call(content.INGEST_WRITE, request, timeout=None, patience=PATIENCE_SECONDS)
        if self._on_progress is not None:
            self._on_progress(offset + len(data))

    async def _commit(self, size: int) -> str:
        if self._expected is not None and self.digest != self._expected:
            raise FailedPrecondition(f"what was uploaded has the digest {self.digest}, {self._expected} was expected")
        request = content.WriteIngest(
            ref=self._ref, offset=size, commit=True, expected=self.digest, total=size, session=self._session
        )
        committed = await self._client.call(content.INGEST_WRITE, request, timeout=None, patience=PATIENCE_SECONDS)
        return committed.committed or self.digest

    async def _stop(self) -> None:
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        self._sending.clear()

    async def end(self, *, drop: bool) -> None:
        """Drops the ingest, or leaves it for whoever comes next; best effort, as it expires anyway."""
        with suppress(ShoalError, TimeoutError):
            async with asyncio.timeout(2):
                if drop:
                    await self._client.call(content.INGEST_ABORT, content.IngestRequest(ref=self._ref), patience=1.0)
                else:
                    release = content.ReleaseIngest(ref=self._ref, session=self._session)
                    await self._client.call(content.INGEST_RELEASE, release, patience=1.0)


async def download(client: Client, digest: str, *, offset: int = 0, size: int = 0) -> AsyncIterator[bytes]:
    """A blob's bytes from `offset` on, all of them or `size`, as they come; asked for again from where they break off.

    All of a blob is compared with its digest: DATA_LOSS at the end where it differs. NOT_FOUND, OUT_OF_RANGE.
    """
    algorithm, _, expected = digest.partition(":")
    hashed = hashlib.new(algorithm) if not offset and not size else None
    at, ends, stalls = offset, offset + size if size else 0, 0
    while True:
        request = content.ReadBlob(digest=digest, offset=at, size=ends - at if ends else 0)
        before = at
        try:
            chunks = client.stream(content.BLOB_READ, request, timeout=None, patience=PATIENCE_SECONDS)
            async with aclosing(chunks) as stream:  # type: ignore[type-var]
                async for chunk in stream:
                    if hashed is not None:
                        hashed.update(chunk.data)
                    at += len(chunk.data)
                    yield chunk.data
            break
        except Unavailable:
            stalls = 0 if at > before else stalls + 1
            if stalls == _STALLS:
                raise
            if ends and at >= ends:
                break
            await asyncio.sleep(_PAUSE_SECONDS)
    if hashed is not None and hashed.hexdigest() != expected:
        raise DataLoss(
            f"blob {digest}: what came has the digest {algorithm}:{hashed.hexdigest()}",
            hint="run `shoal content scrub` on its node",
        )


def _next(source: Readable, size: int, hashed: hashlib._Hash) -> bytes:
    """In a thread: the next piece, as large as it may be but for the last one, hashed."""
    pieces, missing = [], size
    while missing and (data := source.read(missing)):
        pieces.append(data)
        missing -= len(data)
    data = b"".join(pieces)
    hashed.update(data)
    return data
