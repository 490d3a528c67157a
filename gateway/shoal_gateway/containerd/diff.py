"""containerd.services.diff.v1.Diff: layers into snapshots and out of them, which is the snapshot service's work."""

from __future__ import annotations

import re

from shoal_bus.api import snapshot as api
from shoal_bus.errors import Unimplemented

from shoal_gateway.blobs import claimed
from shoal_gateway.call import Call
from shoal_gateway.convert import descriptor_of, descriptor_told, labels_of, moment_of, mounts_of
from shoal_gateway.proto.containerd.services.diff.v1 import diff_pb2 as pb
from shoal_gateway.rpc import Servicer

DEFAULT_MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+(gzip|zstd))?"
    r"|docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.(gzip|zstd))?)"
)
"""The media types of layers that need no program to be read."""


class Diff(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Diff"]

    async def apply(self, call: Call, request: pb.ApplyRequest) -> pb.ApplyResponse:
        """The mounts are those of an active snapshot."""
        descriptor = descriptor_of(request.diff)
        if request.payloads and not _LAYER.fullmatch(descriptor.media_type):
            raise Unimplemented(f"layer {descriptor.digest}: payloads aren't passed on to stream processors")
        async with claimed(call, descriptor.digest) as claim:
            wanted = api.ApplyLayer(
                descriptor=descriptor.model_copy(update={"size": claim.size}),
                path=claim.path,
                mounts=mounts_of(request.mounts),
                sync=request.sync_fs,
            )
            applied = await call.operate(api.DIFF_APPLY, wanted)
        return pb.ApplyResponse(applied=descriptor_told(applied.descriptor))

    async def diff(self, call: Call, request: pb.DiffRequest) -> pb.DiffResponse:
        """Both mount lists are those of snapshots."""
        if request.media_type and not _LAYER.fullmatch(request.media_type):
            raise Unimplemented(f"unsupported diff media type: {request.media_type}")
        epoch = int(moment_of(request.source_date_epoch).timestamp()) if request.HasField("source_date_epoch") else None
        wanted = api.ComputeDiff(
            lower=mounts_of(request.left),
            upper=mounts_of(request.right),
            media_type=request.media_type or DEFAULT_MEDIA_TYPE,
            ref=request.ref,
            labels=labels_of(request.labels),
            source_date_epoch=epoch,
        )
        return pb.DiffResponse(diff=descriptor_told((await call.operate(api.DIFF_COMPUTE, wanted)).descriptor))
