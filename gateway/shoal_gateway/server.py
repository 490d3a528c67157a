"""The gRPC server on its Unix socket, with every service it has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog
from shoal_bus.client import Client
from shoal_bus.errors import FailedPrecondition
from shoal_bus.node import Node

from shoal_gateway.containerd.containers import Containers
from shoal_gateway.containerd.content import Content
from shoal_gateway.containerd.diff import Diff
from shoal_gateway.containerd.events import Events
from shoal_gateway.containerd.images import Images
from shoal_gateway.containerd.introspection import Introspection
from shoal_gateway.containerd.leases import Leases
from shoal_gateway.containerd.mounts import Mounts
from shoal_gateway.containerd.namespaces import Namespaces
from shoal_gateway.containerd.sandbox_controller import SandboxController
from shoal_gateway.containerd.sandbox_store import SandboxStore
from shoal_gateway.containerd.snapshots import Snapshots
from shoal_gateway.containerd.streaming import Streaming
from shoal_gateway.containerd.tasks import Tasks
from shoal_gateway.containerd.transfer import Transfer
from shoal_gateway.containerd.version import Version
from shoal_gateway.health import Health
from shoal_gateway.http2.server import listening
from shoal_gateway.listener import Listener
from shoal_gateway.live import LiveEvents
from shoal_gateway.metrics import Metrics
from shoal_gateway.reflection import Reflection
from shoal_gateway.rpc import Servicer, bind
from shoal_gateway.streams import Streams

log = structlog.get_logger(__name__)

DRAIN_SECONDS = 3.0
"""How long calls under way may take to finish when the gateway stops; subscribers are ended then."""
PLUGINS = {
    "containers": "runtime",
    "content": "content",
    "diff": "snapshot",
    "events": "",
    "healthcheck": "",
    "images": "content",
    "introspection": "",
    "leases": "content",
    "mounts": "runtime",
    "namespaces": "content",
    "sandbox-controllers": "runtime",
    "sandboxes": "runtime",
    "snapshots": "snapshot",
    "streaming": "",
    "tasks": "runtime",
    "transfer": "content",
    "version": "",
}
"""The gRPC plugins that Introspection shows, and the service each of them needs."""
SERVICERS: tuple[type[Servicer], ...] = (
    Version, Introspection, Namespaces, Containers, Tasks, Events, Content, Images, Leases, Snapshots, Diff, Mounts,
    SandboxStore, SandboxController, Streaming, Transfer,
)  # fmt: skip
"""containerd's services that the gateway has."""


def servicers(
    node: Node, client: Client, live: LiveEvents, metrics: Metrics, version: str, *, snapshotter: str = ""
) -> list[Servicer]:
    """Every gRPC service of the gateway. `snapshotter` is where transferred images go whose client doesn't say."""
    streams = Streams()
    api: list[Servicer] = [
        Version(version),
        Introspection(node, client, PLUGINS, version),
        Namespaces(),
        Containers(),
        Tasks(),
        Events(live, metrics),
        Content(),
        Images(),
        Leases(),
        Snapshots(),
        Diff(node.state),
        Mounts(),
        SandboxStore(),
        SandboxController(),
        Streaming(streams),
        Transfer(streams, node.state, snapshotter),
    ]
    names = [one.service.full_name for one in api]
    health = Health(client.connection, names)
    return [*api, health, Reflection([*names, health.service.full_name])]


@asynccontextmanager
async def serving(
    path: Path,
    services: Sequence[Servicer],
    client: Client,
    metrics: Metrics,
    *,
    owner: tuple[int, int] = (0, 0),
    ready: Awaitable[None] | None = None,
) -> AsyncIterator[None]:
    """Serves on the Unix socket at `path`, of the user and group `owner`, for a block; from when `ready` returns.

    At its end the path goes, then calls may finish.
    """
    methods = {path: method for one in services for path, method in bind(one, client, metrics).items()}
    listener = Listener(path, owner)
    async with AsyncExitStack() as stack:
        with listener.binding() as address:
            try:
                server = await stack.enter_async_context(listening(address.removeprefix("unix:"), methods))
            except OSError as error:
                raise FailedPrecondition(f"{path}: can't be listened on ({error})") from None
        stack.push_async_callback(server.stop, DRAIN_SECONDS)
        if ready is not None:
            await ready
        async with listener.published():
            log.info("gateway.serving", path=str(path), services=[one.service.full_name for one in services])
            yield
