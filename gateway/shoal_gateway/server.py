"""The gRPC server on its Unix socket, with every service it has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import structlog
from grpc_reflection.v1alpha import reflection
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
from shoal_gateway.listener import Listener
from shoal_gateway.live import LiveEvents
from shoal_gateway.metrics import Metrics
from shoal_gateway.rpc import Servicer, bind
from shoal_gateway.streams import Streams

log = structlog.get_logger(__name__)

LARGEST_REQUEST = 16 << 20
"""What containerd takes, and its clients send at most."""
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
    return [*api, Health(client.connection, [one.service.full_name for one in api])]


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
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", LARGEST_REQUEST),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 64 << 10),
        ]
    )
    server.add_generic_rpc_handlers([bind(one, client, metrics) for one in services])
    names = [one.service.full_name for one in services]
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    listener = Listener(path, owner)
    with listener.binding() as address:
        try:
            server.add_insecure_port(address)
        except RuntimeError as error:
            raise FailedPrecondition(f"{path}: can't be listened on ({error})") from None
    await server.start()
    try:
        if ready is not None:
            await ready
        async with listener.published():
            log.info("gateway.serving", path=str(path), services=names)
            yield
    finally:
        await server.stop(DRAIN_SECONDS)
