"""containerd.services.content.v1.Content: blobs and ingests, which the content service has.

On its node the gateway reads a blob's own file, which it is given for a while (a claim check), and writes to an
ingest's; elsewhere both come and go in pieces over the bus.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress

from google.protobuf.empty_pb2 import Empty
from shoal_bus.api import content
from shoal_bus.errors import AlreadyExists, InvalidArgument, NotFound, OutOfRange

from shoal_gateway.blobs import Readings, read
from shoal_gateway.call import Call
from shoal_gateway.convert import batches, digest_of, labels_of, paths_of, timestamp
from shoal_gateway.errors import worded
from shoal_gateway.ingest import Ingest
from shoal_gateway.proto.containerd.services.content.v1 import content_pb2 as pb
from shoal_gateway.rpc import Servicer


class Content(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Content"]

    def __init__(self) -> None:
        self._readings = Readings()

    async def info(self, call: Call, request: pb.InfoRequest) -> pb.InfoResponse:
        with worded(f"content digest {request.digest}"):
            found = await call.ask(content.BLOB_INFO, content.BlobRequest(digest=digest_of(request.digest)))
        return pb.InfoResponse(info=_told(found))

    async def update(self, call: Call, request: pb.UpdateRequest) -> pb.UpdateResponse:
        digest = digest_of(request.info.digest)
        paths = paths_of(request.update_mask, f"content info {digest!r}")
        wanted = content.UpdateBlob(digest=digest, labels=labels_of(request.info.labels), fields=paths)
        with worded(f"content digest {digest}"):
            return pb.UpdateResponse(info=_told(await call.ask(content.BLOB_UPDATE, wanted)))

    async def list(self, call: Call, request: pb.ListContentRequest) -> AsyncGenerator[pb.ListContentResponse, None]:
        blobs = call.items(content.BLOB_LIST, content.ListBlobs(filters=list(request.filters)))
        async for batch in batches(blobs):
            yield pb.ListContentResponse(info=[_told(one) for one in batch])

    async def delete(self, call: Call, request: pb.DeleteContentRequest) -> Empty:
        with worded(f"content digest {request.digest}"):
            await call.ask(content.BLOB_DELETE, content.BlobRequest(digest=digest_of(request.digest)))
        return Empty()

    async def read(self, call: Call, request: pb.ReadContentRequest) -> AsyncGenerator[pb.ReadContentResponse, None]:
        """A negative offset is the blob's beginning, and a size that isn't positive reads to its end."""
        wanted = content.ReadBlob(
            digest=digest_of(request.digest), offset=max(0, request.offset), size=max(0, request.size)
        )
        with worded(f"content digest {wanted.digest}"):
            async with aclosing(read(call, self._readings, wanted)) as chunks:
                async for offset, data in chunks:
                    yield pb.ReadContentResponse(offset=offset, data=data)

    async def status(self, call: Call, request: pb.StatusRequest) -> pb.StatusResponse:
        with worded(f"reference {request.ref}"):
            found = await call.ask(content.INGEST_STATUS, content.IngestRequest(ref=request.ref))
        return pb.StatusResponse(status=_status(found))

    async def list_statuses(self, call: Call, request: pb.ListStatusesRequest) -> pb.ListStatusesResponse:
        statuses = call.items(content.INGEST_LIST, content.ListBlobs(filters=list(request.filters)))
        return pb.ListStatusesResponse(statuses=[_status(one) async for one in statuses])

    async def abort(self, call: Call, request: pb.AbortRequest) -> Empty:
        with worded(f"reference {request.ref}"):
            await call.ask(content.INGEST_ABORT, content.IngestRequest(ref=request.ref))
        return Empty()

    async def write(
        self, call: Call, requests: AsyncIterator[pb.WriteContentRequest]
    ) -> AsyncGenerator[pb.WriteContentResponse, None]:
        """One ingest. Each request has its response, and the last response comes once more at the end."""
        first = await anext(requests, None)
        if first is None:
            return
        if not first.ref:
            raise InvalidArgument("first message must have a reference")
        expected, total = first.expected, max(0, first.total)
        async with Ingest.opened(call, first.ref, total, digest_of(expected) if expected else None) as ingest:
            request: pb.WriteContentRequest | None = first
            while request is not None:
                if request.expected:
                    expected = digest_of(request.expected)
                    if request is not first and request.action != pb.COMMIT:
                        await _refuse_what_is_there(call, ingest, expected)
                total = request.total if request.total > 0 else total
                if request.action != pb.STAT:
                    await _write(ingest, request)
                if request.action == pb.COMMIT:
                    await ingest.commit(total, expected or None, labels_of(request.labels))
                response = pb.WriteContentResponse(
                    action=request.action,
                    started_at=timestamp(ingest.started_at),
                    updated_at=timestamp(ingest.updated_at),
                    offset=ingest.offset,
                    total=total,
                    digest=ingest.digest,
                )
                yield response
                request = await anext(requests, None) if request.action != pb.COMMIT else None
            yield response


async def _write(ingest: Ingest, request: pb.WriteContentRequest) -> None:
    """Writes where a request says; at 0, an ingest that has something starts over. OUT_OF_RANGE."""
    if request.offset > 0 and request.offset != ingest.offset:
        raise OutOfRange(f"write @{request.offset} must occur at current offset {ingest.offset}")
    if request.offset <= 0 and ingest.offset:
        await ingest.truncate()
    if request.data:
        await ingest.write(request.data)


async def _refuse_what_is_there(call: Call, ingest: Ingest, expected: str) -> None:
    """ALREADY_EXISTS where the namespace has a blob; the ingest that was to become it is dropped."""
    with suppress(NotFound):
        await call.ask(content.BLOB_INFO, content.BlobRequest(digest=expected))
        await ingest.abort()
        raise AlreadyExists(f"blob with expected digest {expected} exists")


def _told(info: content.BlobInfo) -> pb.Info:
    return pb.Info(
        digest=info.digest,
        size=info.size,
        created_at=timestamp(info.created_at),
        updated_at=timestamp(info.updated_at),
        labels=info.labels,
    )


def _status(status: content.IngestStatus) -> pb.Status:
    return pb.Status(
        started_at=timestamp(status.started_at),
        updated_at=timestamp(status.updated_at),
        ref=status.ref,
        offset=status.offset,
        total=status.total,
        expected=status.expected,
    )
