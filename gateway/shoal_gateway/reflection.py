"""The standard gRPC reflection service, by which tools learn what there is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection

from grpc_reflection.v1alpha import reflection_pb2 as pb

from shoal_gateway.call import Call
from shoal_gateway.rpc import Servicer


class Reflection(Servicer):
    """What grpc's own servicer answers."""

    service = pb.DESCRIPTOR.services_by_name["ServerReflection"]

    def __init__(self, served: Collection[str]) -> None:
        self._served = [*served, self.service.full_name]

    async def server_reflection_info(
        self, call: Call, requests: AsyncIterator[pb.ServerReflectionRequest]
    ) -> AsyncGenerator[pb.ServerReflectionResponse, None]:
        from grpc_reflection.v1alpha._async import ReflectionServicer  # grpc's memory, only where it is wanted

        async for answer in ReflectionServicer(self._served).ServerReflectionInfo(requests, None):
            yield answer
