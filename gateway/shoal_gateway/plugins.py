"""What a node is made of, in containerd's terms: which of its plugins each of shoal's processes stands for."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal_bus import restart
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


CONTENT = "io.containerd.content.v1"
METADATA = "io.containerd.metadata.v1"
SNAPSHOTTER = "io.containerd.snapshotter.v1"
RUNTIME = "io.containerd.runtime.v2"
INTERNAL = "io.containerd.internal.v1"
EVENT = "io.containerd.event.v1"
SERVICE = "io.containerd.service.v1"
GRPC = "io.containerd.grpc.v1"

SERVICES = (
    Kind(CONTENT, "content", "content", place="content"),
    Kind(EVENT, "exchange"),
    # nerdctl asks for it, by its id and with these words, before it labels a container with a restart policy.
    Kind(INTERNAL, "restart", "runtime", (EVENT, SERVICE), capabilities=restart.NAMES),
    Kind(RUNTIME, "task", "runtime", (EVENT, CONTENT, SNAPSHOTTER), platforms=True),
    Kind(SERVICE, "containers-service", "runtime", (EVENT, METADATA)),
    Kind(SERVICE, "namespaces-service", "content", (CONTENT, EVENT)),
    Kind(SERVICE, "tasks-service", "runtime", (EVENT, RUNTIME, METADATA)),
    Kind(SERVICE, "introspection-service"),
    Kind(SNAPSHOTTER, "overlayfs", "snapshot", platforms=True, place="snapshot"),
)
"""What containerd has too. Shoal's network service has no counterpart there."""


def plugins(root: Path, answering: Collection[str], served: Mapping[str, str]) -> list[Plugin]:
    """Every plugin. One whose service isn't among `answering` has an `init_err`.

    `served` maps the id of each gRPC plugin to the service it depends on (empty: none).
    """
    kinds = [*SERVICES, *(Kind(GRPC, id, service) for id, service in served.items())]
    return [_plugin(kind, root, answering) for kind in sorted(kinds, key=lambda kind: (kind.type, kind.id))]


def _plugin(kind: Kind, root: Path, answering: Collection[str]) -> Plugin:
    plugin = Plugin(type=kind.type, id=kind.id, requires=kind.requires, capabilities=kind.capabilities)
    if kind.platforms:
        plugin.platforms.append(host_platform())
    if kind.place:
        plugin.exports["root"] = str(root / kind.place)
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
