"""The node's events, live, to any number of subscribers: one consumer on the stream for all of them, none for nobody.

A subscription holds from the moment `subscribe` is entered, and nothing is dropped: a subscriber that falls behind by
more than the hub keeps for it goes on from its place in the stream, with a reader of its own, at its own pace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime

import structlog
from shoal_bus import subjects
from shoal_bus.clock import passing
from shoal_bus.connection import Connection
from shoal_bus.consumer import Received, read_events
from shoal_bus.message import now

from shoal_gateway.payloads import Forwarded, forwarded

log = structlog.get_logger(__name__)

BEHIND = 1024
"""Events kept for a subscriber that is slow."""
_RETRY_SECONDS = 0.5


@dataclass(eq=False)
class _Subscriber:
    came: datetime
    came_at: float
    """The same by a clock that nobody sets."""
    queue: asyncio.Queue[Forwarded] = field(default_factory=lambda: asyncio.Queue(BEHIND))
    behind: bool = False
    reached: bool = False
    """The reader has come to what was told since this subscriber came."""

    def take(self, event: Forwarded, at: datetime) -> None:
        """Keeps an event for it, unless it has to find it in the stream itself."""
        self.reached = self.reached or at >= self.came
        if self.behind or not self.reached:
            return
        try:
            self.queue.put_nowait(event)
        except asyncio.QueueFull:
            self.behind = True


class LiveEvents:
    """The hub. `run` reads the stream while anybody is subscribed; `subscribe` joins it."""

    def __init__(self, connection: Connection, node: str, *, domain: str = "") -> None:
        self._connection, self._domain = connection, domain
        self._patterns = [subjects.event_pattern(node)]
        self._subscribers: set[_Subscriber] = set()
        self._wanted, self._unwanted = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Follows the stream from the first subscriber to the last, and again; cancelled at the end."""
        while True:
            await self._wanted.wait()
            if not self._subscribers:
                continue  # it came, and has left again
            following = asyncio.create_task(self._follow(min(s.came_at for s in self._subscribers)))
            try:
                while self._subscribers:  # one may have come since the last one left: it goes on for that one
                    await self._unwanted.wait()
            finally:
                following.cancel()  # from here on it hands nothing on: who comes meanwhile gets it all from the next
                await asyncio.wait({following})

    async def _follow(self, came_at: float) -> None:
        """Hands events on, from when the first subscriber came; begins again behind the last one after trouble."""
        position: int | None = None
        while True:
            try:
                events = self._events(moment=came_at) if position is None else self._events(start=position + 1)
                async with aclosing(events):
                    async for received in events:
                        position = received.sequence
                        event = forwarded(received)
                        for subscriber in self._subscribers:
                            subscriber.take(event, received.event.timestamp)
            except Exception as error:  # noqa: BLE001 (without its reader a gateway is silent)
                log.warning("events.retrying", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_RETRY_SECONDS)

    def _join(self, subscriber: _Subscriber) -> None:
        self._subscribers.add(subscriber)
        self._unwanted.clear()
        self._wanted.set()

    def _leave(self, subscriber: _Subscriber) -> None:
        self._subscribers.discard(subscriber)
        if not self._subscribers:
            self._wanted.clear()
            self._unwanted.set()

    async def subscribe(self, wanted: Callable[[Forwarded], bool]) -> AsyncGenerator[Forwarded, None]:
        """The events from now on that `wanted` says yes to."""
        subscriber = _Subscriber(now(), passing())
        self._join(subscriber)
        log.info("events.subscribed")
        try:
            async with aclosing(self._every(subscriber)) as events:
                async for event in events:
                    if wanted(event):
                        yield event
        finally:
            self._leave(subscriber)
            log.info("events.unsubscribed")

    async def _every(self, subscriber: _Subscriber) -> AsyncGenerator[Forwarded, None]:
        last = 0
        while not (subscriber.behind and subscriber.queue.empty()):
            event = await subscriber.queue.get()
            last = event.sequence
            yield event
        self._leave(subscriber)
        log.info("events.behind", sequence=last)
        async with aclosing(self._events(start=last + 1)) as events:
            async for received in events:
                yield forwarded(received)

    def _events(self, *, moment: float | None = None, start: int | None = None) -> AsyncGenerator[Received, None]:
        return read_events(self._connection, self._patterns, moment=moment, start=start, domain=self._domain)
