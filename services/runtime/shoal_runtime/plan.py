"""What a run makes in other services, fixed before the first of it: what it does again, and undoes, comes from here.

A run that is resumed, or undone after a crash, must say the same as it said before: an image's name may mean another
image by then, and a request's id goes with its payload.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from shoal_bus.api import content, network, snapshot
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.message import Message
from shoal_bus.types import Mount

MADE_FOR = "shoal.io/run"
"""The label, on what a run made, that holds the run's request id: what somebody else made is never removed."""
_PATIENCE_SECONDS = 5.0


class RunPlan(Message):
    """One run's plan, kept in its row."""

    request_id: str
    id: str
    image: str
    config: dict[str, Any]
    parent: str
    snapshotter: str
    runtime: str
    network: api.RunNetwork
    unpacked: bool = False
    """The image's layers weren't there, and were unpacked for this run."""

    @property
    def labels(self) -> dict[str, str]:
        return {MADE_FOR: self.request_id}

    @property
    def bridged(self) -> bool:
        return self.network.mode == "bridge"


def check_network(wanted: api.RunNetwork) -> None:
    """INVALID_ARGUMENT for a network that can't be: allocating addresses is not shoal's business."""
    if wanted.mode == "bridge" and wanted.address is None:
        raise InvalidArgument("network bridge: an address is needed", hint="give one, as --ip 10.88.0.2/24")
    if wanted.mode != "bridge" and (wanted.address or wanted.gateway):
        raise InvalidArgument(f"network {wanted.mode}: takes no address and no gateway", hint="use --net bridge")


async def make_plan(client: Client, id: str, request: api.RunTask, runtime: str) -> RunPlan:
    """Finds the image out. Changes nothing; `id` is the request's. NOT_FOUND for the image."""
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=request.image))
    return RunPlan(
        request_id=id, id=request.id, image=resolved.image.name, config=resolved.config, parent=resolved.chain_id,
        snapshotter=request.snapshotter, runtime=runtime, network=request.network,
    )  # fmt: skip


class Made:
    """What a run makes outside this service: its snapshot, and, with a bridge, its network."""

    def __init__(self, client: Client, plan: RunPlan) -> None:
        self._client, self._plan = client, plan

    # Each step's id derives from the run's: asked for again, by whichever copy, it is the same request.

    async def snapshot(self) -> list[Mount]:
        """The container's own snapshot on top of the image's, and how to mount it. NOT_FOUND: it isn't unpacked."""
        plan = self._plan
        verb = snapshot.SNAPSHOT_PREPARE.on(plan.snapshotter)
        prepare = snapshot.PrepareSnapshot(key=plan.id, parent=plan.parent, labels=plan.labels)
        step = f"{plan.request_id}.{'prepare-unpacked' if plan.unpacked else 'prepare'}"
        return (await self._client.call(verb, prepare, id=step, patience=_PATIENCE_SECONDS)).mounts

    async def network(self) -> network.Network:
        """The container's network namespace, unattached."""
        plan = self._plan
        create = network.CreateNetwork(id=plan.id, labels=plan.labels)
        return await self._client.call(network.NETWORK_CREATE, create, id=f"{plan.request_id}.network")

    async def attach(self) -> None:
        """Its link into the bridge."""
        plan = self._plan
        wanted = plan.network
        assert wanted.address is not None
        attach = network.AttachLink(
            id=plan.id, bridge=wanted.bridge, addresses=[wanted.address], gateway=wanted.gateway
        )
        await self._client.call(network.LINK_ATTACH, attach, id=f"{plan.request_id}.attach")

    async def network_again(self, patience: float) -> None:
        """Makes what is gone of its network, as after a reboot; what is there stays. Asked by a later request than the
        run's, whose id the plan then has: that one's answers are of the network that was.
        """
        plan = self._plan
        if not plan.bridged:
            return
        attached = False
        try:
            request = network.NetworkRequest(id=plan.id)
            found = await self._client.call(network.NETWORK_GET, request, patience=patience)
            attached = bool(found.attachments)
        except NotFound:
            await self.network()
        if not attached:
            await self.attach()

    # Undoing what may have been asked for by a copy that died asks for it again first: then it is certain to be there,
    # and a request still on its way can't make it after we have looked.

    async def undo_network(self) -> None:
        """Removes the network, if there is one of this run."""
        if not self._plan.bridged:
            return

        async def labels() -> dict[str, str]:
            found = await self._client.call(network.NETWORK_GET, network.NetworkRequest(id=self._plan.id))
            return found.labels

        if await self._is_ours(self.network, labels):
            await self.remove_network()

    async def undo_snapshot(self) -> None:
        """Removes the snapshot, if there is one of this run."""
        verb = snapshot.SNAPSHOT_STAT.on(self._plan.snapshotter)

        async def labels() -> dict[str, str]:
            return (await self._client.call(verb, snapshot.SnapshotRequest(key=self._plan.id))).labels

        if await self._is_ours(self.snapshot, labels):
            await self.remove_snapshot()

    async def _is_ours(
        self, make: Callable[[], Awaitable[object]], labels: Callable[[], Awaitable[dict[str, str]]]
    ) -> bool:
        try:
            await make()
        except AlreadyExists:
            with suppress(NotFound):
                return (await labels()).get(MADE_FOR) == self._plan.request_id
            return False
        except (NotFound, FailedPrecondition, InvalidArgument):
            return False  # it couldn't be made, so it wasn't
        return True

    async def remove_network(self) -> None:
        if self._plan.bridged:
            with suppress(NotFound):
                await self._client.call(network.NETWORK_DELETE, network.NetworkRequest(id=self._plan.id))

    async def remove_snapshot(self) -> None:
        with suppress(NotFound):
            verb = snapshot.SNAPSHOT_REMOVE.on(self._plan.snapshotter)
            await self._client.call(verb, snapshot.SnapshotRequest(key=self._plan.id))
