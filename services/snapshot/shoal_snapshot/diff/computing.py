"""Has layers computed, and the content service take them, piece by piece as they are made."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shoal_bus.api import content
from shoal_bus.api.snapshot import ComputedDiff, ComputeDiff, ComputeProgress
from shoal_bus.context import Context
from shoal_bus.errors import AlreadyExists, InvalidArgument, NotFound
from shoal_bus.message import pack
from shoal_bus.types import Descriptor, Mount

from shoal_snapshot.apply.errors import Unacceptable
from shoal_snapshot.diff.compress import compression_of
from shoal_snapshot.diff.compute import directories_of
from shoal_snapshot.records import Snapshot
from shoal_snapshot.snapshots import Snapshots
from shoal_snapshot.worker import Works

UNCOMPRESSED = "containerd.io/uncompressed"
_AT_ONCE = 2
_PIECE = 1 << 19
_HEADROOM = 1 << 14


class Diffs:
    """The layers that are computed from the snapshots of every snapshotter here."""

    def __init__(self, every: Sequence[Snapshots], works: Works) -> None:
        self._every, self._works = every, works
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def compute(self, ctx: Context, request: ComputeDiff) -> ComputedDiff:
        """Makes a layer of what differs between two mount lists. What has been written of it is dropped if it fails."""
        try:
            compression = compression_of(request.media_type)
        except Unacceptable as error:
            raise InvalidArgument(error.message, hint=error.hint) from None
        snapshots = self._named(ctx, [*request.lower, *request.upper])
        if ctx.resumed:
            await self.undo(ctx, request)
        elif request.ref:
            await _unused(ctx, request.ref)
        upload = _Upload(ctx, _ref(ctx, request))

        def report(told: dict[str, int]) -> None:
            ctx.progress(ComputeProgress(uncompressed=told["uncompressed"], written=told["written"]))

        arguments = {
            "lower": [mount.model_dump() for mount in request.lower],
            "upper": [mount.model_dump() for mount in request.upper],
            "compression": compression, "source_date_epoch": request.source_date_epoch,
        }  # fmt: skip
        try:
            async with self._slots:
                made = await self._works.compute(arguments, report, upload.take)
            for owner, snapshot in snapshots:
                if owner.records.by_id(ctx.namespace, snapshot.id) is None:
                    raise NotFound(f"snapshot {snapshot.key}: was removed while its files were read")
            labels = {**request.labels, UNCOMPRESSED: made["diff_id"]}
            await upload.commit(made["digest"], made["size"], labels)
        except BaseException:
            if upload.begun:
                await asyncio.shield(self.undo(ctx, request))
            raise
        descriptor = Descriptor(
            media_type=request.media_type, digest=made["digest"], size=made["size"],
            annotations={UNCOMPRESSED: made["diff_id"]},
        )  # fmt: skip
        return ComputedDiff(descriptor=descriptor, diff_id=made["diff_id"], entries=made["entries"])

    async def undo(self, ctx: Context, request: ComputeDiff) -> None:
        """Drops what was written of the layer."""
        with suppress(NotFound):
            await ctx.client.call(content.INGEST_ABORT, content.IngestRequest(ref=_ref(ctx, request)))

    def _named(self, ctx: Context, mounts: list[Mount]) -> list[tuple[Snapshots, Snapshot]]:
        """The snapshots whose directories are mounted. NOT_FOUND for what is none of this namespace's."""
        found = []
        for directory in directories_of([mount.model_dump() for mount in mounts]):
            place = Path(directory)
            id = place.parent.name
            owner = next((one for one in self._every if one.snapshotter.root == place.parent.parent.parent), None)
            snapshot = None
            if owner is not None and id.isdecimal() and len(id) < 19 and owner.snapshotter.layer(int(id)) == place:
                snapshot = owner.records.by_id(ctx.namespace, int(id))
            if owner is None or snapshot is None:
                raise NotFound(f"{directory}: is no snapshot of this namespace")
            found.append((owner, snapshot))
        return found


class _Upload:
    """One blob on its way into an ingest."""

    def __init__(self, ctx: Context, ref: str) -> None:
        self._client, self._ref = ctx.client, ref
        limit = ctx.client.connection.max_payload - _HEADROOM - len(pack(ref))
        self._piece = min(_PIECE, limit)
        self._offset = 0
        self.begun = False

    async def take(self, reader: asyncio.StreamReader) -> None:
        """Writes what comes, until it ends."""
        while True:
            try:
                piece = await reader.readexactly(self._piece)
            except asyncio.IncompleteReadError as rest:
                if rest.partial:
                    await self._write(rest.partial)
                return
            await self._write(piece)

    async def commit(self, digest: str, size: int, labels: dict[str, str]) -> None:
        """Makes a blob of it; one that is there already is as good."""
        last = content.WriteIngest(
            ref=self._ref, offset=self._offset, commit=True, total=size, expected=digest, labels=labels
        )
        with suppress(AlreadyExists):
            await self._client.call(content.INGEST_WRITE, last, timeout=None)

    async def _write(self, data: bytes) -> None:
        written = content.WriteIngest(ref=self._ref, offset=self._offset, data=data)
        self.begun = True
        await self._client.call(content.INGEST_WRITE, written)
        self._offset += len(data)


def _ref(ctx: Context, request: ComputeDiff) -> str:
    return request.ref or f"diff-{ctx.id}"


async def _unused(ctx: Context, ref: str) -> None:
    """ALREADY_EXISTS for an ingest that is somebody's."""
    with suppress(NotFound):
        await ctx.client.call(content.INGEST_STATUS, content.IngestRequest(ref=ref))
        raise AlreadyExists(f"ingest {ref}: is there already", hint="choose another ref, or abort that one")
