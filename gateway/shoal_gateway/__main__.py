"""`shoal-gateway`: containerd's gRPC API on a Unix socket, HTTP for health and metrics, and the node's dispatcher."""

from __future__ import annotations

import argparse
from importlib.metadata import version as version_of
from pathlib import Path

import structlog
from shoal_bus import discovery
from shoal_bus.client import Client
from shoal_bus.dispatcher import dispatching
from shoal_bus.process import Process, run_service
from shoal_bus.subjects import WHOLE_NODE

from shoal_gateway import service as on_the_bus
from shoal_gateway.containerd.events import ForwardedEvents
from shoal_gateway.live import LiveEvents
from shoal_gateway.metrics import Metrics
from shoal_gateway.server import servicers, serving
from shoal_gateway.ttrpc import serving_ttrpc

log = structlog.get_logger(__name__)

SOCKET = "containerd.sock"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", type=Path, help=f"the Unix socket (default: <state>/{SOCKET})")
    parser.add_argument(
        "--ttrpc", type=Path, metavar="ADDRESS", help="the Unix socket for ttrpc (default: gRPC's and .ttrpc)"
    )
    parser.add_argument("--socket-uid", type=int, default=0, help="the user who owns them (their mode is 0660)")
    parser.add_argument("--socket-gid", type=int, default=0, help="the group that may use them, too")
    parser.add_argument(
        "--snapshotter", default="", help="where transferred images are unpacked whose client doesn't say"
    )
    parser.add_argument(
        "--await", type=float, default=0.0, metavar="SECONDS", dest="patience",
        help="serve once each of the node's services answers, or after so long (default: at once)",
    )  # fmt: skip
    parser.add_argument(
        "--http", default="", metavar="[HOST]:PORT", help="serve /healthz, /readyz and /metrics (default: don't)"
    )


async def setup(process: Process) -> None:
    node, connection, stack = process.node, process.connection, process.stack
    version = version_of("shoal-gateway")
    address: Path = process.args.address or node.state / SOCKET
    client = Client(connection, node.name, WHOLE_NODE)
    metrics, live = Metrics(), LiveEvents(connection, node.name, domain=node.domain)
    service = process.service("containerd's gRPC API, and HTTP for health and metrics")
    on_the_bus.register(service, node, address=address, http=process.args.http, version=version)
    service.background(live.run(), "live events")
    if process.args.http:
        from shoal_gateway.http import Endpoints, serving_http  # aiohttp's memory, only where it is wanted

        await stack.enter_async_context(serving_http(process.args.http, Endpoints(client, metrics)))
    owner = process.args.socket_uid, process.args.socket_gid
    services = servicers(node, client, live, metrics, version, snapshotter=process.args.snapshotter)
    ttrpc: Path = process.args.ttrpc or address.with_name(f"{address.name}.ttrpc")
    events = [ForwardedEvents()]
    await stack.enter_async_context(serving_ttrpc(ttrpc, events, client, metrics, owner=owner))
    await stack.enter_async_context(
        serving(address, services, client, metrics, owner=owner, ready=_services_answer(process))
    )
    await stack.enter_async_context(dispatching(process))


async def _services_answer(process: Process) -> None:
    """Returns when they do, or when it has been waited for long enough: clients are told then what is missing.

    A client of containerd's takes a node that serves for one all of whose parts are there.
    """
    if process.args.patience > 0:
        missing = await discovery.all_answer(
            process.connection, process.node.name, process.stop, seconds=process.args.patience
        )
        if missing and not process.stop.is_set():
            log.warning("gateway.services_missing", services=sorted(missing))


def main() -> None:
    run_service("gateway", setup, arguments=arguments)


if __name__ == "__main__":
    main()
