"""The node's events, live, to any number of subscribers: one consumer on the stream for all of them.

A subscription holds from the moment `subscribe` is entered, and nothing is dropped: a subscriber that falls behind by
more than the hub keeps for it goes on from its place in the stream, with a reader of its own, at its own pace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog
from shoal_bus import subjects
from shoal_bus.connection import Connection
from shoal_bus.consumer import Received, read_events
from shoal_bus.message import now

from shoal_gateway.payloads import Forwarded, forwarded

log = structlog.get_logger(__name__)

BEHIND = 1024
"""Events kept for a subscriber that is slow."""
_RETRY_SECONDS = 0.5
_SKEW = timedelta(minutes=1)
"""The stream's server may have another clock; events carry this node's."""


@dataclass(eq=False)
class _Subscriber:
    queue: asyncio.Queue[Forwarded] = field(default_factory=lambda: asyncio.Queue(BEHIND))
    behind: bool = False


class LiveEvents:
    """The hub. `run` reads the stream for ever; `subscribe` joins it."""

    def __init__(self, connection: Connection, node: str, *, domain: str = "") -> None:
        self._connection, self._domain = connection, domain
        self._patterns = [subjects.event_pattern(node)]
        self._subscribers: set[_Subscriber] = set()
        # Everything since this moment is read, so that who subscribes misses nothing, also before the bus is there.
        self._began = now()
        self._position: int | None = None

    async def run(self) -> None:
        """Reads events and hands them on; cancelled at the end."""
        while True:
            try:
                await self._read()
            except Exception as error:  # noqa: BLE001 (without its reader a gateway is silent: begin again behind the last)
                log.warning("events.retrying", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_RETRY_SECONDS)

    async def _read(self) -> None:
        if self._position is None:
            events = self._events(since=self._began - _SKEW)
        else:
            events = self._events(start=self._position + 1)
        async with aclosing(events):
            async for received in events:
                self._position = received.sequence
                self._hand_on(received)

    def _hand_on(self, received: Received) -> None:
        if not self._subscribers or received.event.timestamp < self._began:
            return
        event = forwarded(received)
        for subscriber in self._subscribers:
            if not subscriber.behind:
                try:
                    subscriber.queue.put_nowait(event)
                except asyncio.QueueFull:
                    subscriber.behind = True

    async def subscribe(self, wanted: Callable[[Forwarded], bool]) -> AsyncGenerator[Forwarded, None]:
        """The events from now on that `wanted` says yes to."""
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        log.info("events.subscribed")
        try:
            async with aclosing(self._every(subscriber)) as events:
                async for event in events:
                    if wanted(event):
                        yield event
        finally:
            self._subscribers.discard(subscriber)
            log.info("events.unsubscribed")

    async def _every(self, subscriber: _Subscriber) -> AsyncGenerator[Forwarded, None]:
        last = 0
        while not (subscriber.behind and subscriber.queue.empty()):
            event = await subscriber.queue.get()
            last = event.sequence
            yield event
        self._subscribers.discard(subscriber)
        log.info("events.behind", sequence=last)
        async with aclosing(self._events(start=last + 1)) as events:
            async for received in events:
                yield forwarded(received)

    def _events(self, *, since: datetime | None = None, start: int | None = None) -> AsyncGenerator[Received, None]:
        return read_events(self._connection, self._patterns, since=since, start=start, domain=self._domain)
