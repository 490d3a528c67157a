"""containerd.services.introspection.v1.Introspection: the node's parts, and whether they answer."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from shoal_bus import discovery
from shoal_bus.connection import Connection
from shoal_bus.errors import FailedPrecondition, NotFound, Unimplemented
from shoal_bus.filters import compile_filters
from shoal_bus.node import Node

from shoal_gateway.call import Call
from shoal_gateway.plugins import field_of, plugins
from shoal_gateway.proto.containerd.services.introspection.v1 import introspection_pb2 as pb
from shoal_gateway.rpc import Servicer

PATIENCE_SECONDS = 0.5
"""How long a service may take to say that it is there."""
_UUIDS = uuid.UUID("d5f0a3d0-6b5e-5e2c-9a53-1f5a7c2f2b11")
"""The name space of node UUIDs (RFC 9562, version 5)."""
_MACHINE_ID = Path("/etc/machine-id")


class Introspection(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Introspection"]

    def __init__(self, node: Node, connection: Connection, served: Mapping[str, str]) -> None:
        self._node, self._connection, self._served = node, connection, served
        self._uuid = str(node_uuid(node))

    async def plugins(self, call: Call, request: pb.PluginsRequest) -> pb.PluginsResponse:
        matches = compile_filters(list(request.filters))
        every = await self._plugins()
        return pb.PluginsResponse(plugins=[one for one in every if matches(partial(field_of, one))])

    async def server(self, call: Call, request: Empty) -> pb.ServerResponse:
        return pb.ServerResponse(uuid=self._uuid, pid=os.getpid(), pidns=os.stat("/proc/self/ns/pid").st_ino)  # noqa: PTH116

    async def plugin_info(self, call: Call, request: pb.PluginInfoRequest) -> pb.PluginInfoResponse:
        for plugin in await self._plugins():
            if (plugin.type, plugin.id) == (request.type, request.id):
                break
        else:
            raise NotFound(f"plugin {request.type}.{request.id}: not found")
        if request.HasField("options"):
            if plugin.HasField("init_err"):
                raise FailedPrecondition(f"plugin {request.type}.{request.id}: {plugin.init_err.message}")
            raise Unimplemented(f"plugin {request.type}.{request.id}: has no further information")
        return pb.PluginInfoResponse(plugin=plugin)

    async def _plugins(self) -> list[pb.Plugin]:
        found = await discovery.ping(self._connection, self._node.name, seconds=PATIENCE_SECONDS)
        return plugins(self._node.root, {one.name for one in found}, self._served)


def node_uuid(node: Node) -> uuid.UUID:
    """The same for every copy of a node's gateway, whenever it starts: of the machine, the node's name and its root."""
    machine = _MACHINE_ID.read_text().strip() if _MACHINE_ID.exists() else ""
    return uuid.uuid5(_UUIDS, f"{machine}/{node.name}/{node.root.absolute()}")
