"""Subjects to domain: which verb is answered by what, and what it locks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from shoal_bus.api import network as api
from shoal_bus.process import Process

from shoal_network.links import BridgeDriver
from shoal_network.netns import DEFAULT_DIRECTORY
from shoal_network.networks import Networks, lock_of
from shoal_network.records import MIGRATIONS


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that only this service has."""
    parser.add_argument(
        "--netns-dir", type=Path, default=Path(os.environ.get("SHOAL_NETNS_DIR", "") or DEFAULT_DIRECTORY),
        help="where network namespaces are mounted (default: SHOAL_NETNS_DIR, or /run/netns, where `ip netns` looks)",
    )  # fmt: skip
    parser.add_argument(
        "--host-netns", default=os.environ.get("SHOAL_HOST_NETNS", ""),
        help="the network namespace of the host's bridges (default: SHOAL_HOST_NETNS, or this process's own)",
    )  # fmt: skip


async def setup(process: Process) -> None:
    """Registers every verb, and mends what the last copy left."""
    database = process.database(MIGRATIONS)
    service = process.service("network namespaces that last, and what is attached to them")
    host = Path(process.args.host_netns) if process.args.host_netns else None
    networks = Networks(database, process.locks, BridgeDriver(host), process.args.netns_dir)
    service.handle(api.NETWORK_GET, networks.get)
    service.stream(api.NETWORK_LIST, networks.list)
    service.handle(api.NETWORK_CREATE, networks.create, lock=lambda r: lock_of(r.id))
    service.handle(api.NETWORK_DELETE, networks.delete, lock=lambda r: lock_of(r.id))
    service.handle(api.LINK_ATTACH, networks.attach, lock=lambda r: lock_of(r.id))
    service.handle(api.LINK_DETACH, networks.detach, lock=lambda r: lock_of(r.id))
    await networks.reconcile()
