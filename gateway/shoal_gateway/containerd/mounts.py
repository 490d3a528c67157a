"""containerd.services.mounts.v1.Mounts: mounts that a server makes for its clients, of kinds that mount(2) hasn't got.

Shoal's snapshotters have none of these: what `Prepare`, `View` and `Mounts` return, a client mounts as it is. So there
is nothing to activate, which containerd tells its clients by UNIMPLEMENTED: they mount what they have then.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from google.protobuf.empty_pb2 import Empty
from shoal_bus.errors import InvalidArgument, NotFound, Unimplemented
from shoal_bus.filters import compile_filters

from shoal_gateway.call import Call
from shoal_gateway.convert import quote
from shoal_gateway.proto.containerd.services.mounts.v1 import mounts_pb2 as pb
from shoal_gateway.rpc import Servicer


class Mounts(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Mounts"]

    async def activate(self, call: Call, request: pb.ActivateRequest) -> pb.ActivateResponse:
        _ = call.namespace
        if not request.name:
            raise InvalidArgument("an activation needs a name")
        if request.temporary:
            raise Unimplemented("no mounts are made here for clients: mount them where they are needed")
        special = [mount.type for mount in request.mounts if "/" in mount.type or mount.type == "loop"]
        if special:
            raise Unimplemented(f"mount type {special[0]}: isn't one of any snapshotter here, and can't be activated")
        raise Unimplemented("nothing to activate: these mounts can be mounted as they are")

    async def deactivate(self, call: Call, request: pb.DeactivateRequest) -> Empty:
        raise _missing(call, request.name)

    async def info(self, call: Call, request: pb.InfoRequest) -> pb.InfoResponse:
        raise _missing(call, request.name)

    async def list(self, call: Call, request: pb.ListRequest) -> AsyncGenerator[pb.ListMessage, None]:
        """None, as none is ever activated."""
        _ = call.namespace
        compile_filters(list(request.filters))
        for _ in ():
            yield pb.ListMessage()


def _missing(call: Call, name: str) -> NotFound:
    _ = call.namespace
    return NotFound(f"mount {quote(name)}: not found")
