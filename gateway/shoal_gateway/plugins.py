"""What a node is made of, in containerd's terms: which of its plugins each of shoal's processes stands for."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal_bus import restart
from shoal_bus.api import snapshot
from shoal_bus.errors import Code

from shoal_gateway.proto.containerd.services.introspection.v1.introspection_pb2 import Plugin
from shoal_gateway.proto.containerd.types.platform_pb2 import Platform

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_VARIANTS = {"aarch64": "v8", "armv7l": "v7"}


@dataclass(frozen=True)
class Kind:
    """A plugin and the service behind it (empty: the gateway itself)."""

    type: str
    id: str
    service: str = ""
    requires: Sequence[str] = ()
    platforms: bool = False
    place: str = ""
    """Where it keeps its things, below the node's root."""
    capabilities: Sequence[str] = ()
    exports: Mapping[str, str] = field(default_factory=dict)


CONTENT = "io.containerd.content.v1"
DIFFER = "io.containerd.differ.v1"
EVENT = "io.containerd.event.v1"
GC = "io.containerd.gc.v1"
GRPC = "io.containerd.grpc.v1"
INTERNAL = "io.containerd.internal.v1"
LEASE = "io.containerd.lease.v1"
METADATA = "io.containerd.metadata.v1"
MONITOR = "io.containerd.monitor.task.v1"
MOUNT_HANDLER = "io.containerd.mount-handler.v1"
MOUNT_MANAGER = "io.containerd.mount-manager.v1"
POD_CONTROLLER = "io.containerd.podsandbox.controller.v1"
RUNTIME = "io.containerd.runtime.v2"
SANDBOX_CONTROLLER = "io.containerd.sandbox.controller.v1"
SANDBOX_STORE = "io.containerd.sandbox.store.v1"
SERVICE = "io.containerd.service.v1"
SHIM = "io.containerd.shim.v1"
SNAPSHOTTER = "io.containerd.snapshotter.v1"
STREAMING = "io.containerd.streaming.v1"
TRANSFER = "io.containerd.transfer.v1"
_METADATA = "content/metadata.db"

SERVICES = (
    Kind(CONTENT, "content", "content", place="content"),
    Kind(DIFFER, "walking", "snapshot", (METADATA,), platforms=True),
    Kind(EVENT, "exchange"),
    Kind(GC, "scheduler", "content", (METADATA,)),
    # nerdctl asks for it, by its id and with these words, before it labels a container with a restart policy.
    Kind(INTERNAL, "restart", "runtime", (EVENT, SERVICE), capabilities=restart.NAMES),
    Kind(LEASE, "manager", "content", (METADATA,)),
    # A namespace sees the blobs that it has fetched or written itself, and no others.
    Kind(
        METADATA, "bolt", "content", (CONTENT, SNAPSHOTTER), place="content/metadata.db", exports={"policy": "isolated"}
    ),
    Kind(MONITOR, "cgroups", "runtime", (EVENT,), platforms=True),
    Kind(MOUNT_HANDLER, "loop", "runtime", platforms=True),
    Kind(MOUNT_MANAGER, "bolt", "runtime", (METADATA, MOUNT_HANDLER), place="runtime"),
    Kind(POD_CONTROLLER, "podsandbox", "runtime", (EVENT, SHIM)),
    Kind(RUNTIME, "task", "runtime", (EVENT, METADATA, SHIM), platforms=True),
    Kind(SANDBOX_CONTROLLER, "shim", "runtime", (EVENT, SHIM)),
    Kind(SANDBOX_STORE, "local", "runtime", (METADATA,)),
    Kind(SERVICE, "containers-service", "runtime", (EVENT, METADATA)),
    Kind(SERVICE, "content-service", "content", (METADATA,)),
    Kind(SERVICE, "diff-service", "snapshot", (DIFFER,)),
    Kind(SERVICE, "images-service", "content", (METADATA, GC)),
    Kind(SERVICE, "introspection-service"),
    Kind(SERVICE, "leases-service", "content", (LEASE,)),
    Kind(SERVICE, "namespaces-service", "content", (METADATA, EVENT)),
    Kind(SERVICE, "snapshots-service", "snapshot", (METADATA,)),
    Kind(SERVICE, "tasks-service", "runtime", (EVENT, RUNTIME, METADATA)),
    Kind(SHIM, "manager", "runtime", (EVENT, METADATA)),
    Kind(STREAMING, "manager"),
    Kind(TRANSFER, "local", "content", (METADATA, LEASE, DIFFER), platforms=True),
)
"""What containerd has too. Shoal's network service has no counterpart there."""
_FIRST_SNAPSHOTTER = Kind(SNAPSHOTTER, snapshot.DEFAULT, "snapshot", platforms=True)
"""The one that is there whatever the snapshot service says, and while it doesn't."""


def plugins(
    root: Path,
    answering: Collection[str],
    served: Mapping[str, str],
    snapshotters: Collection[snapshot.SnapshotterInfo] = (),
) -> list[Plugin]:
    """Every plugin. One whose service isn't among `answering` has an `init_err`.

    `served` maps the id of each gRPC plugin to the service it depends on (empty: none); `snapshotters` are those that
    work on this node.
    """
    kinds = [*SERVICES, *(Kind(GRPC, id, service) for id, service in served.items())]
    kinds += [
        Kind(
            SNAPSHOTTER, one.name, platforms=True, capabilities=one.capabilities,
            exports={"root": one.root} if one.root else {},
        )
        for one in snapshotters
    ] or [_FIRST_SNAPSHOTTER]  # fmt: skip
    return [_plugin(kind, root, answering) for kind in sorted(kinds, key=lambda kind: (kind.type, kind.id))]


def _plugin(kind: Kind, root: Path, answering: Collection[str]) -> Plugin:
    plugin = Plugin(type=kind.type, id=kind.id, requires=kind.requires, capabilities=kind.capabilities)
    if kind.platforms:
        plugin.platforms.append(host_platform())
    if kind.place:
        plugin.exports["path" if kind.type == METADATA else "root"] = str(root / kind.place)
    plugin.exports.update(kind.exports)
    if kind.service and kind.service not in answering:
        plugin.init_err.code = Code.UNAVAILABLE
        plugin.init_err.message = f"shoal's {kind.service} service doesn't answer on this node"
    return plugin


def host_platform() -> Platform:
    """The platform of this host, in OCI's words."""
    machine = platform.machine()
    return Platform(os="linux", architecture=_ARCHITECTURES.get(machine, machine), variant=_VARIANTS.get(machine, ""))


def field_of(plugin: Plugin, path: Sequence[str]) -> str | None:
    """What containerd's filter language sees of a plugin: its type and its id."""
    match path:
        case ["type"]:
            return plugin.type
        case ["id"]:
            return plugin.id
        case _:
            return None
