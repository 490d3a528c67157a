"""One blob's upload (OCI distribution-spec v1.1, "Pushing blobs"): in one piece, and in several where that is needed.

What breaks off is asked after, and goes on where the registry has it; where the registry has lost it, or won't say, it
begins again. One that the registry finds too large is sent in pieces of the size it asks for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import aiohttp
import structlog
from shoal_bus.errors import DataLoss, FailedPrecondition, NotFound, ShoalError, Unavailable
from shoal_bus.types import Descriptor
from yarl import URL

from shoal_content.registry import headers as said
from shoal_content.registry.resolver import Source
from shoal_content.registry.tokens import Scopes
from shoal_content.registry.transport import Payload, Refused, TooLarge, Transport, pause

log = structlog.get_logger(__name__)

_STALLS = 4
"""How often in a row a registry may break off without having kept another byte."""
_BREAKS = 200
_PIECE, _SMALLEST_PIECE = 8 << 20, 64 << 10
_LARGEST_PIECE = 1 << 30
_ABANDON_SECONDS = 3.0
_MINIMUM = "OCI-Chunk-Min-Length"


class Upload:
    """One upload of one blob to one repository."""

    def __init__(
        self, transport: Transport, scopes: Scopes, what: str, descriptor: Descriptor, source: Source, piece: int,
        report: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._transport, self._scopes, self._what = transport, scopes, what
        self._descriptor, self._source, self._report = descriptor, source, report
        self._piece = piece
        """Bytes sent at once; 0 for all of them."""
        self._minimum = 0
        self._place: URL | None = None
        self._offset = 0
        """How much of it the registry has."""
        self._broken: Exception | None = None
        """What our own side failed with: the HTTP library has a name of its own for it."""

    async def run(self, place: URL | None = None) -> None:
        """Uploads it, as the upload that has been begun at `place` if there is one."""
        self._place = place
        stalls = breaks = 0
        try:
            while True:
                before = self._offset
                try:
                    await self._attempt()
                    return
                except TooLarge:
                    await self._in_pieces()
                    continue
                except (NotFound, Unavailable) as error:
                    if self._broken is not None:
                        raise self._broken from None
                    problem: ShoalError = error
                if not await self._go_on(problem) and await self._is_there():
                    return  # it was the answer alone that was lost
                stalls, breaks = (0 if self._offset > before else stalls + 1), breaks + 1
                if stalls >= _STALLS or breaks >= _BREAKS:
                    raise problem
                if stalls == _STALLS // 2 and not self._piece:
                    self._piece = _PIECE  # some say by hanging up that it is too much at once
                log.info(
                    "upload.resuming", digest=self._descriptor.digest, offset=self._offset, problem=problem.message
                )
                await pause(stalls + 1)
        except BaseException:
            await self._abandon()
            raise

    # ---------------------------------------------------------------------------------------------------------- steps

    async def _attempt(self) -> None:
        size = self._descriptor.size
        if self._place is None:
            self._offset = 0
            self._place = await self._begin()
        if not self._piece and not self._offset:
            await self._put(self._payload(0, size))
            return
        while self._offset < size:
            ends = min(size, self._offset + max(self._piece, self._minimum)) if self._piece else size
            await self._patch(self._offset, ends)
        await self._put(Payload.of(b""))

    async def _begin(self) -> URL:
        url = self._transport.url("blobs", "uploads", "")
        asked = asyncio.create_task(self._request("POST", url, frozenset({202}), Payload.of(b""), tries=0))
        try:
            response = await asyncio.shield(asked)
        except asyncio.CancelledError:
            # What has just been begun must be known, to be taken back.
            await asyncio.wait({asked}, timeout=_ABANDON_SECONDS)
            asked.cancel()
            if asked.done() and not asked.cancelled() and asked.exception() is None:
                self._place = self._transport.leads_to(url, asked.result())
            raise
        self._minimum = min(said.number(response.headers.get(_MINIMUM, "")) or 0, _LARGEST_PIECE)
        return self._transport.leads_to(url, response)

    async def _patch(self, begins: int, ends: int) -> None:
        """Sends a piece."""
        assert self._place is not None
        headers = {"Content-Range": f"{begins}-{ends - 1}", "Content-Type": "application/octet-stream"}
        response = await self._request(
            "PATCH", self._place, frozenset({202, 204}), self._payload(begins, ends), headers
        )
        if "Location" in response.headers:
            self._place = self._transport.leads_to(self._place, response)
        taken = said.bytes_taken(response.headers.get("Range", ""))
        if taken is not None and not begins < taken <= ends and ends > 1:
            raise Refused(f"{self._what}: registry {self._transport.host} takes other bytes than it is sent")
        self._offset = taken or ends

    async def _put(self, payload: Payload) -> None:
        """Ends it, with the bytes of `payload`."""
        assert self._place is not None
        digest = self._descriptor.digest
        url = said.with_query(self._place, "digest", digest)
        headers = {"Content-Type": "application/octet-stream"}
        try:
            response = await self._request("PUT", url, frozenset({200, 201, 204}), payload, headers)
        except TooLarge:
            raise
        except Refused as error:
            if "DIGEST" in error.message:
                raise DataLoss(error.message, hint="is the blob whole on this node?") from None
            raise
        kept = response.headers.get("Docker-Content-Digest", digest)
        # Some name it by an algorithm of their own, whatever it was sent under.
        if kept != digest and kept.partition(":")[0] == digest.partition(":")[0]:
            raise DataLoss(f"{self._what}: registry {self._transport.host} has kept other bytes than it was sent")
        self._place = None

    async def _go_on(self, problem: ShoalError) -> bool:
        """Finds out how much the registry has of what broke off; False where it must begin again."""
        if self._place is None or isinstance(problem, NotFound):
            self._place = None
            return False
        try:
            response = await self._request("GET", self._place, frozenset({200, 204}), tries=2)
            taken = said.bytes_taken(response.headers.get("Range", ""))
            if not taken or taken > self._descriptor.size:
                raise FailedPrecondition("it says nothing that makes sense")
            if "Location" in response.headers:
                self._place = self._transport.leads_to(self._place, response)
        except ShoalError as error:
            log.debug("upload.lost", digest=self._descriptor.digest, error=error.message)
            await self._abandon()
            return False
        self._offset = taken
        return True

    async def _is_there(self) -> bool:
        url = self._transport.url("blobs", self._descriptor.digest)
        try:
            await self._request("HEAD", url, frozenset({200}))
        except ShoalError:
            return False
        return True

    async def _in_pieces(self) -> None:
        """Has it sent in pieces, or in smaller ones."""
        smaller = max(self._minimum, self._piece // 2 if self._piece else _PIECE)
        if smaller == self._piece or smaller < _SMALLEST_PIECE:
            raise FailedPrecondition(f"{self._what}: too large for registry {self._transport.host}")
        await self._abandon()
        self._piece = smaller

    async def _abandon(self) -> None:
        """Takes it back."""
        place, self._place, self._offset = self._place, None, 0
        if place is not None:
            await abandon(self._transport, self._scopes, place)

    # --------------------------------------------------------------------------------------------------------- within

    async def _request(
        self,
        method: str,
        url: URL,
        wanted: frozenset[int],
        payload: Payload | None = None,
        headers: dict[str, str] | None = None,
        *,
        tries: int = 1,
    ) -> aiohttp.ClientResponse:
        """An answer whose headers are all that matters. What carries bytes isn't tried again: some may have come."""
        response = await self._transport.request(
            method, url, self._what, scopes=self._scopes, wanted=wanted, headers=headers, payload=payload, tries=tries
        )
        response.release()
        return response

    def _payload(self, begins: int, ends: int) -> Payload:
        async def read() -> AsyncIterator[bytes]:
            at = begins
            try:
                async with aclosing(self._source(begins)) as chunks:
                    async for chunk in chunks:
                        data = chunk[: ends - at]
                        yield data
                        # Once whoever sends it asks for more, this much is on its way.
                        at += len(data)
                        self._report(at)
                        if at >= ends:
                            return
                if at < ends:
                    raise DataLoss(f"{self._what}: the blob on this node is shorter than it should be")
            except Exception as error:
                self._broken = error
                raise

        return Payload(ends - begins, read)


async def abandon(transport: Transport, scopes: Scopes, place: URL) -> None:
    """Takes an upload back: best effort, and without keeping anybody waiting."""
    try:
        async with asyncio.timeout(_ABANDON_SECONDS):
            wanted = frozenset({200, 202, 204, 404})
            response = await transport.request("DELETE", place, "an upload", scopes=scopes, wanted=wanted, tries=1)
            response.release()
    except (ShoalError, TimeoutError) as error:
        log.debug("upload.left", registry=str(transport.host), error=str(error))
