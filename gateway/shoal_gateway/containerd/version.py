"""containerd.services.version.v1.Version"""

from __future__ import annotations

from google.protobuf.empty_pb2 import Empty

from shoal_gateway.call import Call
from shoal_gateway.proto.containerd.services.version.v1 import version_pb2
from shoal_gateway.rpc import Servicer


class Version(Servicer):
    """Shoal's own version, as the semantic version with a `v` that clients parse; `revision` says what it is of."""

    service = version_pb2.DESCRIPTOR.services_by_name["Version"]

    def __init__(self, version: str) -> None:
        self._reply = version_pb2.VersionResponse(version=f"v{version}", revision="shoal")

    async def version(self, call: Call, request: Empty) -> version_pb2.VersionResponse:
        return self._reply
