"""containerd.services.introspection.v1.Introspection: the node's parts, and whether they answer."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.empty_pb2 import Empty
from shoal_bus import discovery
from shoal_bus.api import runtime, snapshot
from shoal_bus.client import Client
from shoal_bus.errors import DeadlineExceeded, FailedPrecondition, NotFound, ShoalError, Unavailable, Unimplemented
from shoal_bus.filters import compile_filters
from shoal_bus.neighbours import Neighbours
from shoal_bus.node import Node

from shoal_gateway.call import Call
from shoal_gateway.plugins import RUNTIME, field_of, plugins
from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import Options
from shoal_gateway.proto.containerd.services.introspection.v1 import introspection_pb2 as pb
from shoal_gateway.proto.containerd.types.introspection_pb2 import RuntimeInfo, RuntimeRequest, RuntimeVersion
from shoal_gateway.rpc import Servicer
from shoal_gateway.typeurls import message_of

PATIENCE_SECONDS = 1.0
"""How long a service may take to say that it is there."""
_KEPT_SECONDS = 1.0
"""How long one that goes may still be told: clients ask for the list before each container."""
_UUIDS = uuid.UUID("d5f0a3d0-6b5e-5e2c-9a53-1f5a7c2f2b11")
"""The name space of node UUIDs (RFC 9562, version 5)."""
_MACHINE_ID = Path("/etc/machine-id")
_FEATURES = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
_SERVICES = {*discovery.SERVICES, "gateway", "commands"}
"""What answers on a node without being a snapshotter."""
_SNAPSHOTTER_SECONDS = 2.0
_PREPARES = f"-{snapshot.SNAPSHOT_PREPARE.verb}"
"""How the endpoint's name ends by which a snapshotter is known."""


class Introspection(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Introspection"]

    def __init__(self, node: Node, client: Client, served: Mapping[str, str], version: str) -> None:
        self._node, self._client, self._served, self._version = node, client, served, version
        self._connection = client.connection
        self._neighbours = Neighbours(client.connection, node.name, {one for one in served.values() if one})
        self._uuid = str(node_uuid(node))
        self._known: list[pb.Plugin] = []
        """All plugins, as they were when every service answered: until a time, and until anybody comes."""
        self._known_until, self._known_at = 0.0, -1

    async def plugins(self, call: Call, request: pb.PluginsRequest) -> pb.PluginsResponse:
        matches = compile_filters(list(request.filters))
        every = await self._plugins()
        return pb.PluginsResponse(plugins=[one for one in every if matches(partial(field_of, one))])

    async def server(self, call: Call, request: Empty) -> pb.ServerResponse:
        return pb.ServerResponse(uuid=self._uuid, pid=os.getpid(), pidns=os.stat("/proc/self/ns/pid").st_ino)  # noqa: PTH116

    async def plugin_info(self, call: Call, request: pb.PluginInfoRequest) -> pb.PluginInfoResponse:
        """With options, a plugin tells more of itself: the runtimes' alone, of the runtime that they name."""
        for plugin in await self._plugins():
            if (plugin.type, plugin.id) == (request.type, request.id):
                break
        else:
            raise NotFound(f"plugin {request.type}.{request.id}: not found")
        if not request.HasField("options"):
            return pb.PluginInfoResponse(plugin=plugin)
        if plugin.HasField("init_err"):
            raise FailedPrecondition(f"plugin {request.type}.{request.id}: {plugin.init_err.message}")
        if (plugin.type, plugin.id) != (RUNTIME, "task"):
            raise Unimplemented(f"plugin {request.type}.{request.id}: has no further information")
        return pb.PluginInfoResponse(plugin=plugin, extra=await self._runtime_info(call, request.options))

    async def _runtime_info(self, call: Call, options: AnyProto) -> AnyProto:
        if options.type_url.rpartition("/")[2] != RuntimeRequest.DESCRIPTOR.full_name:
            raise Unimplemented(f"plugin {RUNTIME}.task: nothing is known of {options.type_url}")
        asked = message_of(options, RuntimeRequest, "options")
        binary = message_of(asked.options, Options, "options").binary_name if asked.options.value else ""
        found = await call.ask(runtime.RUNTIME_INFO, runtime.RuntimeInfoRequest(runtime=binary or asked.runtime_path))
        told = RuntimeInfo(
            name=asked.runtime_path or runtime.RUNC_V2,
            version=RuntimeVersion(version=f"v{self._version}", revision="shoal"),
            annotations={"shoal/oci-runtime": found.program, "shoal/oci-runtime.version": found.version},
        )
        if asked.HasField("options"):
            told.options.CopyFrom(asked.options)
        if found.features:
            told.features.type_url, told.features.value = _FEATURES, found.features
        return AnyProto(type_url=RuntimeInfo.DESCRIPTOR.full_name, value=told.SerializeToString())

    async def _plugins(self) -> list[pb.Plugin]:
        arrivals = self._neighbours.arrivals
        if time.monotonic() < self._known_until and arrivals == self._known_at:
            return self._known
        found = await self._neighbours.answering(PATIENCE_SECONDS)
        every = plugins(self._node.root, found, self._served, await self._snapshotters(found))
        if not any(plugin.HasField("init_err") for plugin in every):
            self._known, self._known_at = every, arrivals
            self._known_until = time.monotonic() + _KEPT_SECONDS
        return every

    async def _snapshotters(self, answering: Collection[str]) -> list[snapshot.SnapshotterInfo]:
        """Those of the snapshot service, and those that are processes of their own."""
        infos: dict[str, snapshot.SnapshotterInfo] = {}
        if "snapshot" in answering:
            with suppress(Unavailable, DeadlineExceeded):
                every = self._client.stream(
                    snapshot.SNAPSHOTTER_LIST, snapshot.SnapshotterRequest(), timeout=_SNAPSHOTTER_SECONDS
                )
                infos |= {one.name: one async for one in every}
        for name in await self._others(set(answering) - _SERVICES):
            with suppress(ShoalError):  # it has gone, or can't say
                infos[name] = await self._client.call(
                    snapshot.SNAPSHOT_INFO.on(name), snapshot.SnapshotterRequest(),
                    timeout=_SNAPSHOTTER_SECONDS, patience=0,
                )  # fmt: skip
        return list(infos.values())

    async def _others(self, services: Collection[str]) -> list[str]:
        """The snapshotters that further services on this node are, by what they answer."""
        if not services:
            return []
        every = await discovery.stats(self._connection, self._node.name, awaited=services, seconds=PATIENCE_SECONDS)
        names = [endpoint.name for one in every if one.name in services for endpoint in one.endpoints]
        return [name.removesuffix(_PREPARES) for name in names if name.endswith(_PREPARES)]


def node_uuid(node: Node) -> uuid.UUID:
    """The same for every copy of a node's gateway, whenever it starts: of the machine, the node's name and its root."""
    machine = _MACHINE_ID.read_text().strip() if _MACHINE_ID.exists() else ""
    return uuid.uuid5(_UUIDS, f"{machine}/{node.name}/{node.root.absolute()}")
