"""Reading events: live, from a time, or from where one stopped; each once, in order, over any interruption."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import Header

from shoal_bus import logs, streams, subjects
from shoal_bus.clock import ServerClock
from shoal_bus.connection import Connection
from shoal_bus.errors import InvalidArgument, Unavailable
from shoal_bus.events import Event
from shoal_bus.outbox import EventId
from shoal_bus.pull import Puller, Silent

log = logs.get_logger(__name__)

_ROLLBACK_MARGIN = timedelta(seconds=10)
_PAUSE_SECONDS = 0.25
_TROUBLE = (TimeoutError, nats.errors.Error, nats.js.errors.Error, OSError, Silent, Unavailable)


@dataclass(frozen=True)
class Received:
    """An event, and its place in the stream: give `sequence + 1` as `start` to go on behind it."""

    event: Event
    sequence: int
    subject: str
    id: str = ""
    """Unique for the event, however often it was published: `<outbox>.<epoch>.<seq>`."""


async def read_events(
    connection: Connection,
    patterns: Sequence[str] = (),
    *,
    since: datetime | None = None,
    start: int | None = None,
    moment: float | None = None,
    follow: bool = True,
    domain: str = "",
) -> AsyncGenerator[Received, None]:
    """Events on `patterns` (of `subjects.event_pattern`; none means all), from now on.

    `since` replays from a time of the server's clock, `moment` from one of this machine (of `clock.passing`) or shortly
    before, `start` from a sequence; without `follow` it ends where the stream did when it began.
    A connection that is lost, a consumer the server forgot and a stream that lost its newest minutes are mended.
    Close it (`contextlib.aclosing`) to have the server forget its consumer at once.
    """
    reader = _Reader(connection, JetStreamContext(connection, domain=domain or None), patterns)
    try:
        if moment is not None:
            await connection.up.wait()
            await reader.ensure()
            since = await ServerClock(connection, streams.EVENTS, domain=domain).at(moment)
        left = await reader.begin(since, start)
        while follow or left > 0:
            try:
                messages = await connection.while_up(reader.next())
            except _TROUBLE as error:
                log.debug("events.resuming", error=f"{type(error).__name__}: {error}")
                left = await reader.resume()
                continue
            for message in messages:
                left -= 1
                received = reader.take(message)
                if received is not None:
                    yield received
                if not follow and not left:
                    return
    finally:
        await reader.close()


class _Reader:
    def __init__(self, connection: Connection, js: JetStreamContext, patterns: Sequence[str]) -> None:
        self._connection, self._js = connection, js
        self._puller = Puller(js, streams.EVENTS)
        self._patterns = list(patterns) or [subjects.event_pattern()]
        self._since: datetime | None = None
        # The last message taken: its place, its id, and when the stream stored it.
        self._sequence, self._id = 0, ""
        self._stored: datetime | None = None
        # The newest event taken of each outbox: theirs come in order, so that an older one is one that came again.
        self._newest: dict[str, EventId] = {}

    async def ensure(self) -> None:
        await streams.ensure_events(self._js)

    async def begin(self, since: datetime | None, start: int | None) -> int:
        await self.ensure()
        if start is not None:
            self._sequence = max(1, start) - 1
        elif since is not None:
            self._since = since
        else:
            self._sequence = (await self._js.stream_info(streams.EVENTS)).state.last_seq
        return await self._open()

    async def resume(self) -> int:
        """A new consumer behind the last event taken, or, where the stream has lost that one, from shortly before."""
        while True:
            await asyncio.sleep(_PAUSE_SECONDS)
            await self._connection.up.wait()
            with suppress(*_TROUBLE):
                await streams.ensure_events(self._js)
                if await self._rolled_back():
                    log.warning("events.stream_went_back", sequence=self._sequence)
                    self._since = self._stored - _ROLLBACK_MARGIN if self._stored is not None else None
                    self._sequence, self._id = 0, ""
                return await self._open()

    async def _rolled_back(self) -> bool:
        state = (await self._js.stream_info(streams.EVENTS)).state
        if self._sequence > state.last_seq:
            return True
        if not self._id or self._sequence < state.first_seq:
            return False  # nothing taken yet; or it grew old there, as events do
        try:
            message = await self._js.get_msg(streams.EVENTS, self._sequence)
        except nats.js.errors.NotFoundError:
            return False
        return bool((message.headers or {}).get(Header.MSG_ID, "") != self._id)

    async def _open(self) -> int:
        if self._since is not None:
            return await self._puller.open(self._patterns, since=self._since)
        return await self._puller.open(self._patterns, start=self._sequence + 1)

    async def next(self) -> list[Msg]:
        return await self._puller.next()

    async def close(self) -> None:
        await self._puller.close()

    def take(self, message: Msg) -> Received | None:
        metadata = message.metadata
        text = (message.headers or {}).get(Header.MSG_ID, "")
        self._sequence, self._id, self._stored = metadata.sequence.stream, text, metadata.timestamp
        self._since = None
        id = EventId.parse(text)
        if id is not None:
            newest = self._newest.get(id.outbox)
            if newest is not None and id <= newest:
                return None
            self._newest[id.outbox] = id
        try:
            event = Event.unpack(message.data)
        except InvalidArgument as error:
            log.warning("events.not_an_event", subject=message.subject, sequence=self._sequence, error=str(error))
            return None
        return Received(event, self._sequence, message.subject, text)
