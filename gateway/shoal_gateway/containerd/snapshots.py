"""containerd.services.snapshots.v1.Snapshots: every snapshotter of the node, by its name."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress

from google.protobuf.empty_pb2 import Empty
from shoal_bus.api import content
from shoal_bus.api import snapshot as api
from shoal_bus.client import Unreached
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.types import Labels

from shoal_gateway.call import Call
from shoal_gateway.convert import batches, labels_of, mounts_told, paths_of, quote, timestamp
from shoal_gateway.errors import worded
from shoal_gateway.proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from shoal_gateway.rpc import Servicer

TARGET_LABEL = "containerd.io/snapshot.ref"
"""What a client will commit a snapshot as. Where that is there already, it needn't prepare any."""
_ELSEWHERE_SECONDS = 0.5
"""How long a snapshotter that isn't the snapshot service's may take to say that it is there."""
_KINDS: dict[api.Kind, pb.Kind] = {"active": pb.ACTIVE, "view": pb.VIEW, "committed": pb.COMMITTED}


class Snapshots(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Snapshots"]

    def __init__(self) -> None:
        self._known: set[str] = set()

    async def prepare(self, call: Call, request: pb.PrepareSnapshotRequest) -> pb.PrepareSnapshotResponse:
        name = await self._named(call, request.snapshotter)
        wanted = api.PrepareSnapshot(key=request.key, parent=request.parent, labels=labels_of(request.labels))
        await _refuse_what_is_there(call, name, wanted.labels)
        with worded(_missing(request.parent, "parent snapshot"), f"snapshot {quote(request.key)}"):
            made = await call.ask(api.SNAPSHOT_PREPARE.on(name), wanted)
        return pb.PrepareSnapshotResponse(mounts=mounts_told(made.mounts))

    async def view(self, call: Call, request: pb.ViewSnapshotRequest) -> pb.ViewSnapshotResponse:
        name = await self._named(call, request.snapshotter)
        wanted = api.PrepareSnapshot(key=request.key, parent=request.parent, labels=labels_of(request.labels))
        await _refuse_what_is_there(call, name, wanted.labels)
        with worded(_missing(request.parent, "parent snapshot"), f"snapshot {quote(request.key)}"):
            made = await call.ask(api.SNAPSHOT_VIEW.on(name), wanted)
        return pb.ViewSnapshotResponse(mounts=mounts_told(made.mounts))

    async def mounts(self, call: Call, request: pb.MountsRequest) -> pb.MountsResponse:
        name = await self._named(call, request.snapshotter)
        with worded(_missing(request.key)):
            found = await call.ask(api.SNAPSHOT_MOUNTS.on(name), api.SnapshotRequest(key=request.key))
        return pb.MountsResponse(mounts=mounts_told(found.mounts))

    async def commit(self, call: Call, request: pb.CommitSnapshotRequest) -> Empty:
        name = await self._named(call, request.snapshotter)
        wanted = api.CommitSnapshot(
            name=request.name, key=request.key, labels=labels_of(request.labels), parent=request.parent
        )
        with worded(_missing(request.key), f"snapshot {quote(request.name)}"):
            await call.ask(api.SNAPSHOT_COMMIT.on(name), wanted)
        return Empty()

    async def remove(self, call: Call, request: pb.RemoveSnapshotRequest) -> Empty:
        name = await self._named(call, request.snapshotter)
        try:
            with worded(_missing(request.key)):
                await call.ask(api.SNAPSHOT_REMOVE.on(name), api.SnapshotRequest(key=request.key))
        except FailedPrecondition:
            raise FailedPrecondition("cannot remove snapshot with child: failed precondition") from None
        return Empty()

    async def stat(self, call: Call, request: pb.StatSnapshotRequest) -> pb.StatSnapshotResponse:
        name = await self._named(call, request.snapshotter)
        with worded(_missing(request.key)):
            found = await call.ask(api.SNAPSHOT_STAT.on(name), api.SnapshotRequest(key=request.key))
        return pb.StatSnapshotResponse(info=_told(found))

    async def update(self, call: Call, request: pb.UpdateSnapshotRequest) -> pb.UpdateSnapshotResponse:
        name, asked = await self._named(call, request.snapshotter), request.info
        if not asked.name:
            raise InvalidArgument("snapshot name must not be empty")
        paths, labels = paths_of(request.update_mask, f"snapshot {asked.name!r}"), labels_of(asked.labels)
        with worded(_missing(asked.name)):
            wanted = api.UpdateSnapshot(key=asked.name, labels=labels, fields=paths)
            return pb.UpdateSnapshotResponse(info=_told(await call.ask(api.SNAPSHOT_UPDATE.on(name), wanted)))

    async def list(
        self, call: Call, request: pb.ListSnapshotsRequest
    ) -> AsyncGenerator[pb.ListSnapshotsResponse, None]:
        name = await self._named(call, request.snapshotter)
        snapshots = call.items(api.SNAPSHOT_LIST.on(name), api.ListSnapshots(filters=list(request.filters)))
        async for batch in batches(snapshots):
            yield pb.ListSnapshotsResponse(info=[_told(one) for one in batch])

    async def usage(self, call: Call, request: pb.UsageRequest) -> pb.UsageResponse:
        name = await self._named(call, request.snapshotter)
        with worded(_missing(request.key)):
            usage = await call.ask(api.SNAPSHOT_USAGE.on(name), api.SnapshotRequest(key=request.key))
        return pb.UsageResponse(size=usage.size, inodes=usage.inodes)

    async def cleanup(self, call: Call, request: pb.CleanupRequest) -> Empty:
        name = await self._named(call, request.snapshotter)
        await call.ask(api.SNAPSHOT_CLEANUP.on(name), api.SnapshotterRequest())
        return Empty()

    async def _named(self, call: Call, name: str) -> str:
        """The snapshotter of a request, if there is one of that name. INVALID_ARGUMENT, as with containerd.

        Those that have answered once aren't asked for again: one that is away is UNAVAILABLE.
        """
        _ = call.namespace  # said before anything is asked
        if not name:
            raise InvalidArgument("snapshotter argument missing")
        if name not in self._known:
            self._known |= {one.name async for one in call.items(api.SNAPSHOTTER_LIST, api.SnapshotterRequest())}
        if name not in self._known:
            try:
                info = api.SNAPSHOT_INFO.on(name)
                await call.ask(info, api.SnapshotterRequest(), patience=_ELSEWHERE_SECONDS)
            except (Unreached, ValueError):
                raise InvalidArgument(f"snapshotter not loaded: {name}") from None
            self._known.add(name)
        return name


async def _refuse_what_is_there(call: Call, snapshotter: str, labels: Labels) -> None:
    """ALREADY_EXISTS for what has been committed already; the call's lease has it then."""
    target = labels.get(TARGET_LABEL)
    if not target:
        return
    with suppress(NotFound):
        await call.ask(api.SNAPSHOT_STAT.on(snapshotter), api.SnapshotRequest(key=target))
        if call.lease:
            hold = content.ChangeLease(lease=call.lease, type=f"snapshots/{snapshotter}", id=target)
            await call.ask(content.LEASE_ADD, hold)
            # Looked at again: a collection may have been faster.
            await call.ask(api.SNAPSHOT_STAT.on(snapshotter), api.SnapshotRequest(key=target), step="again")
        raise AlreadyExists(f"target snapshot {quote(target)}: already exists")


def _missing(key: str, what: str = "snapshot") -> str:
    return f"{what} {key} does not exist"


def _told(info: api.SnapshotInfo) -> pb.Info:
    return pb.Info(
        name=info.key,
        parent=info.parent,
        kind=_KINDS[info.kind],
        created_at=timestamp(info.created_at),
        updated_at=timestamp(info.updated_at),
        labels=info.labels,
    )
