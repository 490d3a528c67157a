"""containerd.services.leases.v1.Leases: the content service has them."""

from __future__ import annotations

from contextlib import AbstractContextManager

from google.protobuf.empty_pb2 import Empty
from shoal_bus.api import content
from shoal_bus.errors import Unimplemented

from shoal_gateway.call import Call
from shoal_gateway.convert import labels_of, quote, timestamp
from shoal_gateway.errors import worded
from shoal_gateway.proto.containerd.services.leases.v1 import leases_pb2 as pb
from shoal_gateway.rpc import Servicer

_TYPES = ("content", "images", "ingests", "snapshots")


class Leases(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Leases"]

    async def create(self, call: Call, request: pb.CreateRequest) -> pb.CreateResponse:
        wanted = content.CreateLease(id=request.id, labels=labels_of(request.labels))
        with _worded(request.id):
            made = await call.ask(content.LEASE_CREATE, wanted)
        return pb.CreateResponse(lease=_told(made))

    async def delete(self, call: Call, request: pb.DeleteRequest) -> Empty:
        with _worded(request.id):
            await call.ask(content.LEASE_DELETE, content.DeleteLease(id=request.id, sync=request.sync))
        return Empty()

    async def list(self, call: Call, request: pb.ListRequest) -> pb.ListResponse:
        leases = call.items(content.LEASE_LIST, content.ListLeases(filters=list(request.filters)))
        return pb.ListResponse(leases=[_told(one) async for one in leases])

    async def add_resource(self, call: Call, request: pb.AddResourceRequest) -> Empty:
        wanted = _change(request.id, request.resource)
        with _worded(request.id):
            await call.ask(content.LEASE_ADD, wanted)
        return Empty()

    async def delete_resource(self, call: Call, request: pb.DeleteResourceRequest) -> Empty:
        wanted = _change(request.id, request.resource)
        with _worded(request.id):
            await call.ask(content.LEASE_REMOVE, wanted)
        return Empty()

    async def list_resources(self, call: Call, request: pb.ListResourcesRequest) -> pb.ListResourcesResponse:
        """By type and name, as containerd's."""
        with _worded(request.id):
            resources = call.items(content.LEASE_RESOURCES, content.LeaseRequest(id=request.id))
            return pb.ListResourcesResponse(
                resources=[pb.Resource(id=one.id, type=one.type) async for one in resources]
            )


def _worded(id: str) -> AbstractContextManager[None]:
    return worded(quoted := f"lease {quote(id)}", quoted)


def _change(lease: str, resource: pb.Resource) -> content.ChangeLease:
    if resource.type.partition("/")[0] not in _TYPES:
        raise Unimplemented(f"resource type {resource.type} not supported yet")
    return content.ChangeLease(lease=lease, type=resource.type, id=resource.id)


def _told(lease: content.Lease) -> pb.Lease:
    return pb.Lease(id=lease.id, created_at=timestamp(lease.created_at), labels=lease.labels)
