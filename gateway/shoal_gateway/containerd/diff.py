"""containerd.services.diff.v1.Diff: layers into snapshots and out of them, which is the snapshot service's work."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from google.protobuf.message import Message
from shoal_bus.api import content
from shoal_bus.api import snapshot as api
from shoal_bus.errors import Unimplemented
from shoal_bus.types import Descriptor

from shoal_gateway.blobs import claimed
from shoal_gateway.call import Call
from shoal_gateway.convert import descriptor_of, descriptor_told, labels_of, moment_of, mounts_of
from shoal_gateway.places import place
from shoal_gateway.proto.containerd.services.diff.v1 import diff_pb2 as pb
from shoal_gateway.rpc import Servicer

DEFAULT_MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+(gzip|zstd))?"
    r"|docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.(gzip|zstd))?)"
)
"""The media types of layers that need no program to be read."""


class Diff(Servicer):
    """`state` is the node's state directory."""

    service = pb.DESCRIPTOR.services_by_name["Diff"]

    def __init__(self, state: Path) -> None:
        self._state = state

    async def apply(self, call: Call, request: pb.ApplyRequest) -> pb.ApplyResponse:
        """The mounts are those of an active snapshot."""
        descriptor = descriptor_of(request.diff)
        async with claimed(call, descriptor.digest) as claim:
            with _put(self._state, request.payloads) as payloads:
                applied = await self._apply(call, request, descriptor, claim, payloads)
        return pb.ApplyResponse(applied=descriptor_told(applied.descriptor))

    @staticmethod
    async def _apply(
        call: Call, request: pb.ApplyRequest, descriptor: Descriptor, claim: content.Claim, payloads: str
    ) -> api.AppliedLayer:
        wanted = api.ApplyLayer(
            descriptor=descriptor.model_copy(update={"size": claim.size}),
            path=claim.path,
            mounts=mounts_of(request.mounts),
            payloads=payloads,
            sync=request.sync_fs,
        )
        return await call.operate(api.DIFF_APPLY, wanted)

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


@contextmanager
def _put(state: Path, payloads: Mapping[str, Message]) -> Iterator[str]:
    """What stream processors are given, where the snapshot service finds it under that name; no name for nothing."""
    if not payloads:
        yield ""
        return
    told = {name: base64.b64encode(one.SerializeToString()).decode() for name, one in payloads.items()}
    with place(state / api.PAYLOADS) as path:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:  # noqa: PTH123
            json.dump(told, file)
        yield path.name
