"""Networks: what each verb does, in the kernel and in the rows, so that a killed copy leaves the whole or nothing.

A row is written, with its event and the request's answer, once the kernel has all of it; and dropped once the kernel
has nothing of it any more. What lies between belongs to a request that the harness has recorded: whoever takes it up
again finds names that follow from namespace, id and interface, replaces what is there under them, and goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import structlog
from shoal_bus.api.network import (
    NETWORKS_ATTACH,
    NETWORKS_CREATE,
    NETWORKS_DELETE,
    NETWORKS_DETACH,
    AttachLink,
    Attachment,
    AttachmentEvent,
    CreateNetwork,
    DetachLink,
    ListNetworks,
    Network,
    NetworkEvent,
    NetworkRequest,
)
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import AlreadyExists, NotFound
from shoal_bus.filters import compile_filters
from shoal_bus.locks import Locks
from shoal_bus.message import Empty, now
from shoal_bus.once import Requests

from shoal_network import netns
from shoal_network.driver import Driver
from shoal_network.records import Records
from shoal_network.requests import check
from shoal_network.sweep import sweep

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Networks:
    """The networks of one node. Handlers run under `lock(namespace, id)`, which the harness takes for them."""

    def __init__(self, database: Database, locks: Locks, driver: Driver, directory: Path) -> None:
        self.records, self._db, self._locks = Records(database), database, locks
        self._driver, self._directory = driver, directory

    async def get(self, context: Context, request: NetworkRequest) -> Network:
        return self._known(context.namespace, request.id)

    async def list(self, context: Context, request: ListNetworks) -> AsyncIterator[Network]:
        matches = compile_filters(request.filters)
        for network in self.records.of(context.namespace):
            fields = {"id": network.id, "path": network.path}
            labels = network.labels
            if matches(
                lambda path, fields=fields, labels=labels: (  # type: ignore[misc]
                    labels.get(".".join(path[1:])) if path[0] == "labels" else fields.get(".".join(path))
                )
            ):
                yield network

    async def create(self, context: Context, request: CreateNetwork) -> Network:
        """The namespace, then its row. What is there without a row is a killed attempt's, and is replaced."""
        if self.records.get(context.namespace, request.id) is not None:
            raise AlreadyExists(f"network {request.id}: exists already", hint="choose another id, or delete it first")
        path = self._directory / self.records.netns_name(context.namespace, request.id)
        await _blocking(lambda: netns.create(path))
        network = Network(id=request.id, path=str(path), labels=request.labels, created_at=now())
        try:
            with self._db.write() as tx:
                self.records.add(tx, context.namespace, network, context.id)
                tx.emit(context.namespace, NETWORKS_CREATE, NetworkEvent(id=network.id, path=network.path))
                context.answer(tx, network)
        except BaseException:
            await _blocking(lambda: netns.remove(path))
            raise
        return network

    async def delete(self, context: Context, request: NetworkRequest) -> Empty:
        network = self._known(context.namespace, request.id)
        await self._remove(context.namespace, network, lambda tx: context.answer(tx, Empty()))
        return Empty()

    async def attach(self, context: Context, request: AttachLink) -> Attachment:
        check(request)
        network = self._known(context.namespace, request.id)
        if any(found.interface == request.interface for found in network.attachments):
            raise AlreadyExists(f"interface {request.interface} of network {request.id}: is attached already")
        host = self.records.host_interface(context.namespace, request.id, request.interface)
        bridge, address = request.bridge, request.bridge_address or ""
        async with self._locks.hold(f"bridge/{bridge}"):
            # An address that is there already and that shoal didn't put there is the administrator's: it stays.
            if address and not await _blocking(lambda: self._driver.has_address(bridge, address)):
                self.records.claim(bridge, address)
            attachment: Attachment | None = None
            try:
                attachment = await _blocking(lambda: self._driver.attach(Path(network.path), request, host))
                with self._db.write() as tx:
                    self.records.attach(tx, context.namespace, request.id, attachment, context.id)
                    tx.emit(context.namespace, NETWORKS_ATTACH, _event(request.id, attachment))
                    context.answer(tx, attachment)
            except asyncio.CancelledError:
                raise  # the request stays begun: the next copy finishes it
            except BaseException:
                undone = attachment or Attachment(
                    interface=request.interface, host_interface=host, bridge=bridge, bridge_address=address,
                    mac="", mtu=0,
                )  # fmt: skip
                await self._undo(undone, others=0)
                raise
        return attachment

    async def detach(self, context: Context, request: DetachLink) -> Empty:
        network = self._known(context.namespace, request.id)
        for attachment in network.attachments:
            if attachment.interface == request.interface:
                await self._detach(context.namespace, network.id, attachment, lambda tx: context.answer(tx, Empty()))
                return Empty()
        raise NotFound(f"interface {request.interface} of network {request.id}: not found")

    async def reconcile(self) -> None:
        """Drops the rows whose namespace or link is gone (a reboot takes them all), each with its event; and what is
        there without a row.

        A network that a copy is at work on, or that a recorded request will finish, is left alone.
        """
        requests = Requests(self._db)
        for namespace, listed in self.records.all():
            key = f"{namespace} {lock_of(listed.id)}"
            if not self._locks.try_acquire(key):
                continue
            try:
                network = self.records.get(namespace, listed.id)
                if network is None or requests.begun(key):
                    continue
                if netns.identity(Path(network.path)) is None:
                    log.warning("network.gone", namespace=namespace, id=network.id, path=network.path)
                    await self._remove(namespace, network, lambda tx: None)
                    continue
                for attachment in network.attachments:
                    if not await _blocking(lambda host=attachment.host_interface: self._driver.present(host)):  # type: ignore[misc]
                        log.warning("link.gone", namespace=namespace, id=network.id, interface=attachment.interface)
                        await self._detach(namespace, network.id, attachment, lambda tx: None)
            finally:
                self._locks.release(key)
        sweep(self.records, self._driver, self._directory)

    def _known(self, namespace: str, id: str) -> Network:
        network = self.records.get(namespace, id)
        if network is None:
            raise NotFound(f"network {id}: not found", hint="`shoal network ls` lists them")
        return network

    async def _remove(self, namespace: str, network: Network, answer: Callable[[Transaction], None]) -> None:
        for attachment in network.attachments:
            await self._detach(namespace, network.id, attachment, lambda tx: None)
        await _blocking(lambda: netns.remove(Path(network.path)))
        with self._db.write() as tx:
            self.records.drop(tx, namespace, network.id)
            tx.emit(namespace, NETWORKS_DELETE, NetworkEvent(id=network.id, path=network.path))
            answer(tx)

    async def _detach(
        self, namespace: str, id: str, attachment: Attachment, answer: Callable[[Transaction], None]
    ) -> None:
        await _blocking(lambda: self._driver.unplug(attachment.host_interface))
        async with self._locks.hold(f"bridge/{attachment.bridge}"):
            await self._undo(attachment, others=1)
            with self._db.write() as tx:
                self.records.detach(tx, namespace, id, attachment)
                tx.emit(namespace, NETWORKS_DETACH, _event(id, attachment))
                answer(tx)

    async def _undo(self, attachment: Attachment, *, others: int) -> None:
        """Undoes an attachment in the kernel; the bridge's address too, if at most `others` rows (its own) want it."""
        bridge, address = attachment.bridge, attachment.bridge_address
        last = bool(address) and self.records.claimed(bridge, address) and self.records.users(bridge, address) <= others
        await _blocking(lambda: self._driver.detach(attachment, drop_address=last))
        if last and not others:
            self.records.unclaim(bridge, address)


def lock_of(id: str) -> str:
    """What a verb on this network locks."""
    return f"netns/{id}"


def _event(id: str, attachment: Attachment) -> AttachmentEvent:
    return AttachmentEvent(
        id=id, interface=attachment.interface, bridge=attachment.bridge, addresses=attachment.addresses
    )


async def _blocking(work: Callable[[], T]) -> T:
    """`work` in a worker thread. Its end is awaited also when cancelled: the lock mustn't be given up before."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        with suppress(asyncio.CancelledError):
            await asyncio.wait({running})
        raise
