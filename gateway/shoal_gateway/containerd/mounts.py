"""containerd.services.mounts.v1.Mounts: the runtime service's mount manager.

Where a list can be mounted as it is, activating it is UNIMPLEMENTED: containerd's clients mount it themselves then.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from google.protobuf.empty_pb2 import Empty
from shoal_bus.api import runtime

from shoal_gateway.call import Call
from shoal_gateway.convert import labels_of, mounts_of, mounts_told, paths_of, quote, timestamp
from shoal_gateway.errors import worded
from shoal_gateway.proto.containerd.services.mounts.v1 import mounts_pb2 as pb
from shoal_gateway.proto.containerd.types import mount_pb2 as types
from shoal_gateway.rpc import Servicer


class Mounts(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Mounts"]

    async def activate(self, call: Call, request: pb.ActivateRequest) -> pb.ActivateResponse:
        wanted = runtime.ActivateMounts(
            name=request.name,
            mounts=mounts_of(request.mounts),
            labels=labels_of(request.labels),
            temporary=request.temporary,
        )
        with worded(named := f"mount {quote(request.name)}", named):
            made = await call.ask(runtime.MOUNT_ACTIVATE, wanted, long=True)
        return pb.ActivateResponse(info=_told(made))

    async def deactivate(self, call: Call, request: pb.DeactivateRequest) -> Empty:
        with worded(f"mount {quote(request.name)}"):
            await call.ask(runtime.MOUNT_DEACTIVATE, _named(request.name))
        return Empty()

    async def info(self, call: Call, request: pb.InfoRequest) -> pb.InfoResponse:
        with worded(f"mount {quote(request.name)}"):
            return pb.InfoResponse(info=_told(await call.ask(runtime.MOUNT_INFO, _named(request.name))))

    async def update(self, call: Call, request: pb.UpdateRequest) -> pb.UpdateResponse:
        name = request.info.name
        paths = paths_of(request.update_mask, f"mount {name!r}")
        wanted = runtime.UpdateMount(name=name, labels=labels_of(request.info.labels), fields=paths)
        with worded(f"mount {quote(name)}"):
            return pb.UpdateResponse(info=_told(await call.ask(runtime.MOUNT_UPDATE, wanted)))

    async def list(self, call: Call, request: pb.ListRequest) -> AsyncGenerator[pb.ListMessage, None]:
        async for one in call.items(runtime.MOUNT_LIST, runtime.ListMounts(filters=list(request.filters))):
            yield pb.ListMessage(info=_told(one))


def _named(name: str) -> runtime.MountRequest:
    return runtime.MountRequest(name=name)


def _told(activation: runtime.Activation) -> types.ActivationInfo:
    return types.ActivationInfo(
        name=activation.name,
        active=[
            types.ActiveMount(
                mount=mounts_told([one.mount])[0],
                mounted_at=timestamp(one.mounted_at),
                mount_point=one.mount_point,
                data=one.data,
            )
            for one in activation.active
        ],
        system=mounts_told(activation.system),
        labels=activation.labels,
    )
