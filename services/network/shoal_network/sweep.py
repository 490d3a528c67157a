"""What is in the kernel under this node's names, though neither a row nor a recorded request knows of it.

A killed copy leaves no such thing: its request is recorded, and will be finished. A database that was put back to an
earlier state does.
"""

from __future__ import annotations

from pathlib import Path

import structlog
from shoal_bus.api.network import LINK_ATTACH, LINK_DETACH, NETWORK_CREATE, NETWORK_DELETE, AttachLink, DetachLink
from shoal_bus.once import Requests

from shoal_network import netns
from shoal_network.driver import Driver
from shoal_network.records import Records

log = structlog.get_logger(__name__)

_VERBS = {verb.name: verb for verb in (NETWORK_CREATE, NETWORK_DELETE, LINK_ATTACH, LINK_DETACH)}


def sweep(records: Records, driver: Driver, directory: Path) -> None:
    """Removes it, and says so. Blocks."""
    # Within a write: a request is recorded before its first effect, so until the end no other copy can begin one.
    with records.db.write():
        paths, hosts = _known(records, directory)
        for name in driver.sweep(records.host_prefix, hosts):
            log.warning("link.swept", interface=name)
        for name in netns.names(directory):
            path = directory / name
            if records.is_netns_name(name) and str(path) not in paths:
                log.warning("netns.swept", path=str(path))
                netns.remove(path)


def _known(records: Records, directory: Path) -> tuple[set[str], set[str]]:
    """The paths and the host's ends that belong to a row, or that a recorded request will replace or remove."""
    paths: set[str] = set()
    hosts: set[str] = set()
    for _, network in records.all():
        paths.add(network.path)
        hosts.update(attachment.host_interface for attachment in network.attachments)
    for begun in Requests(records.db).begun():
        verb = _VERBS.get(begun.verb)
        if verb is None:
            continue
        request = verb.request.unpack(begun.payload)
        paths.add(str(directory / records.netns_name(begun.namespace, request.id)))
        if isinstance(request, AttachLink | DetachLink):
            hosts.add(records.host_interface(begun.namespace, request.id, request.interface))
    return paths, hosts
