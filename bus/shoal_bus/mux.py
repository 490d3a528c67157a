"""One inbox subscription for all the replies (and acknowledgements) of a connection."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

import nats.errors
from nats.aio.msg import Msg

from shoal_bus import subjects, wire
from shoal_bus.connection import Connection


class Mailbox:
    """The replies to one request, as they come; None says that the one who was asked may be gone."""

    def __init__(self, subject: str, about: tuple[str, str] = ("", "")) -> None:
        """`about` are the node and the service that was asked."""
        self.subject, self.about = subject, about
        self._messages: deque[Msg | None] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, message: Msg | None) -> None:
        """Lays a message into it."""
        self._messages.append(message)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def next(self, seconds: float | None = None) -> Msg | None:
        """The next message; TimeoutError where none comes within `seconds`. For one who waits at a time."""
        if not self._messages:
            # asyncio.Queue and asyncio.timeout do the same for several times the price, and this is done for each call.
            loop = asyncio.get_running_loop()
            waiting = self._waiting = loop.create_future()
            timer = None if seconds is None else loop.call_later(max(0.0, seconds), _expire, waiting)
            try:
                await waiting
            finally:
                self._waiting = None
                if timer is not None:
                    timer.cancel()
        return self._messages.popleft()


def _expire(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_exception(TimeoutError())


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
                await self.connection.listen(f"{self.prefix}.*", self._deliver)
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

        try:
            ready = subjects.broadcast(node, service, subjects.READY)
            await self.connection.listen(ready, lambda _: self._interrupt(about))
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
                box.put(None)

    def _deliver(self, message: Msg) -> None:
        box = self._boxes.get(message.subject.rpartition(".")[2])
        if box is not None:
            box.put(message)
        elif message.reply and wire.PART in (message.headers or {}):
            with suppress(nats.errors.Error):  # an attempt that was given up: its sender needn't wait for anybody
                self.connection.send(message.reply, wire.STOP)
