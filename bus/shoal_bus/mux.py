"""One inbox subscription for all the replies (and acknowledgements) of a connection."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import nats.errors
from nats.aio.msg import Msg

from shoal_bus import subjects, wire
from shoal_bus.connection import Connection


@dataclass
class Mailbox:
    """The replies to one request, as they come; None says that the one who was asked may be gone."""

    subject: str
    about: tuple[str, str] = ("", "")
    """The node and the service that was asked."""
    queue: asyncio.Queue[Msg | None] = field(default_factory=asyncio.Queue)


class Mux:
    """One subscription for all the replies of a connection.

    A copy of a service that was killed says nothing, and a reply sent while the bus was away is lost. So those who wait
    are told when a new copy is ready, and when the bus is back, and may ask again at once.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.prefix = connection.new_inbox()
        self._boxes: dict[str, Mailbox] = {}
        self._next = 0
        self._started: asyncio.Future[None] | None = None
        self._watched: set[tuple[str, str]] = set()
        connection.on_reconnect(lambda: self._interrupt(None))

    async def start(self) -> None:
        """Subscribes, the first time."""
        if self._started is None:
            self._started = asyncio.get_running_loop().create_future()
            try:
                await self.connection.subscribe(f"{self.prefix}.*", cb=self._deliver)
            except BaseException as error:
                self._started.set_exception(error)
                self._started.exception()
                self._started = None
                raise
            self._started.set_result(None)
        elif not self._started.done():
            await asyncio.shield(self._started)

    async def watch(self, node: str, service: str) -> None:
        """Listens for new copies of a service on a node."""
        about = (node, service)
        if about in self._watched or node == subjects.ALL_NODES:
            return
        self._watched.add(about)

        async def ready(_: Msg) -> None:
            self._interrupt(about)

        try:
            await self.connection.subscribe(subjects.broadcast(node, service, subjects.READY), cb=ready)
        except BaseException:
            self._watched.discard(about)
            raise

    def open(self, about: tuple[str, str] = ("", "")) -> Mailbox:
        """A mailbox for one request."""
        self._next += 1
        token = f"{self._next:x}"
        box = Mailbox(f"{self.prefix}.{token}", about)
        self._boxes[token] = box
        return box

    def close(self, box: Mailbox) -> None:
        """Forgets a mailbox; what still comes for it is dropped."""
        self._boxes.pop(box.subject.rpartition(".")[2], None)

    @property
    def waiting(self) -> int:
        """How many mailboxes are open."""
        return len(self._boxes)

    def _interrupt(self, about: tuple[str, str] | None) -> None:
        for box in self._boxes.values():
            if about is None or box.about == about:
                box.queue.put_nowait(None)

    async def _deliver(self, message: Msg) -> None:
        box = self._boxes.get(message.subject.rpartition(".")[2])
        if box is not None:
            box.queue.put_nowait(message)
        elif message.reply and wire.PART in (message.headers or {}):
            with suppress(nats.errors.Error):  # an attempt that was given up: its sender needn't wait for anybody
                await self.connection.publish(message.reply, wire.STOP)
