"""The outbox's relay: publishes events to the stream, each once, in order, whatever fails on the way.

One relay at a time drains an outbox, however many copies of the service run: whoever holds its lock. One publish is
in flight at a time, so that none overtakes a failed predecessor. Before it begins, after every failure and whenever
the connection was lost, it compares the outbox with the stream: what the stream has is acknowledged, also when the
duplicate window is long over; what the stream has lost (JetStream syncs every two minutes) is published again from
the acknowledged rows, which are kept for that.

Acknowledgements are written down a few at a time, and up to half a second late: a relay that is killed before has the
stream to ask.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import nats.errors
import nats.js.errors
import structlog
from nats.js import JetStreamContext
from nats.js.api import Header

from shoal_bus import streams, subjects, wire
from shoal_bus.database import Database
from shoal_bus.errors import Unavailable
from shoal_bus.events import Event
from shoal_bus.locks import Locks
from shoal_bus.outbox import EventId, Outbox
from shoal_bus.pull import read_headers

if TYPE_CHECKING:
    from shoal_bus.harness import Service

log = structlog.get_logger(__name__)

KEEP_ACKED_SECONDS = 600.0
"""How long an acknowledged row stays: longer than JetStream takes to sync to disk (two minutes)."""
_BATCH = 256
_IDLE_SECONDS = 1.0
_UNWRITTEN, _UNWRITTEN_SECONDS = 64, 0.5
"""How many acknowledgements are kept until they are written down, and for how long: a transaction for each costs more
than its publish."""
_PRUNE_SECONDS = 30.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_PUBLISH_TIMEOUT = 5.0
POKE = "outbox"
LOCK = "outbox relay"


class WrongStream(Exception):
    """A PubAck that doesn't name the expected stream and domain."""


class Relay:
    """Drains one service's outbox from this copy, whenever it is this copy's turn."""

    def __init__(self, service: Service, database: Database, locks: Locks, *, domain: str = "") -> None:
        self._service, self._db, self._locks, self._domain = service, database, locks, domain
        self._connection, self._mux = service.connection, service.client.mux
        self._outbox = Outbox(database)
        self._wake = asyncio.Event()
        self._js = JetStreamContext(service.connection, domain=domain or None, timeout=_PUBLISH_TIMEOUT)
        self._compared = -1
        """In which of the connection's generations outbox and stream were compared; -1 after a failure."""
        self._published = 0
        """The last row that was published since outbox and stream were compared."""
        self._unwritten: list[tuple[int, int]] = []
        """Rows that the stream has acknowledged, and their places there, not written down yet."""
        self._written = 0.0
        self._mine = False
        self._expected_domain = domain
        self._pruned = 0.0
        database.on_emit(self._emitted)
        service.on_broadcast(POKE, self._poked)
        service.before_stop(self._flush_before_stop)
        service.connection.on_reconnect(self._wake.set)

    def _emitted(self) -> None:
        if self._mine:
            self._wake.set()
        else:
            self._service.broadcast_soon(POKE)

    def _poked(self, _: bytes) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Takes its turn, and relays for ever; cancelled at the end."""
        await self._locks.acquire(LOCK)
        self._mine = True
        try:
            await self._mux.start()
            await self._relay_for_ever()
        finally:
            self._mine = False
            with suppress(sqlite3.Error):
                self._write_down()
            self._locks.release(LOCK)

    async def flush(self, seconds: float) -> None:
        """Waits until everything is published, at most `seconds`."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self._outbox.pending(1, self._published):
            self._wake.set()
            await asyncio.sleep(0.01)

    async def _flush_before_stop(self) -> None:
        if self._mine and self._connection.is_connected:
            await self.flush(1.0)

    async def _relay_for_ever(self) -> None:
        pause = _FIRST_PAUSE
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            generation = self._connection.generation
            try:
                await self._drain()
                pause = _FIRST_PAUSE
            except Exception as error:
                # Whether the stream has the row is unknown now: ask before publishing again.
                self._compared = -1
                if generation != self._connection.generation or not self._connection.is_connected:
                    await self._connection.up.wait()
                    continue
                known = isinstance(
                    error, (TimeoutError, nats.errors.Error, nats.js.errors.Error, WrongStream, OSError, Unavailable)
                )
                log.warning(
                    "relay.retrying", error=f"{type(error).__name__}: {error}", seconds=pause, exc_info=not known
                )
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            again = loop.call_later(_UNWRITTEN_SECONDS if self._unwritten else _IDLE_SECONDS, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                again.cancel()

    async def _drain(self) -> None:
        while True:
            if self._compared != self._connection.generation:
                self._write_down()
                await self._connection.while_up(self._compare())
                self._published = 0
            elif len(self._unwritten) >= _UNWRITTEN or time.monotonic() - self._written > _UNWRITTEN_SECONDS:
                self._write_down()
            rows = self._outbox.pending(_BATCH, self._published)
            if not rows:
                break
            for row in rows:
                if self._compared != self._connection.generation:
                    break  # the server was away in between: what it had may be gone
                place = await self._publish(row)
                self._published = row["seq"]
                self._unwritten.append((row["seq"], place))
        if time.monotonic() - self._pruned > _PRUNE_SECONDS:
            self._pruned = time.monotonic()
            self._outbox.prune(KEEP_ACKED_SECONDS)

    def _write_down(self) -> None:
        self._outbox.acknowledge(self._unwritten)
        self._unwritten.clear()
        self._written = time.monotonic()

    async def _publish(self, row: Any) -> int:
        """Publishes one event, and returns its place in the stream."""
        headers = {Header.MSG_ID.value: str(self._outbox.id_of(row)), Header.EXPECTED_STREAM.value: streams.EVENTS}
        payload = row["payload"]
        if len(payload) > self._connection.max_payload - wire.HEADROOM:
            # A server that takes less than the usual: that it happened is still told, and the log has the size.
            log.error("relay.event_cut", subject=row["subject"], bytes=len(payload))
            payload = Event.unpack(payload).model_copy(update={"payload": {}}).pack()
        box = self._mux.open()
        try:
            self._connection.send(row["subject"], payload, box.subject, headers)
            answer = await box.next(_PUBLISH_TIMEOUT)
        finally:
            self._mux.close(box)
        if answer is None:
            raise Unavailable("the bus was lost")
        if answer.headers is not None and answer.headers.get(Header.STATUS) == wire.NO_RESPONDERS:
            raise nats.js.errors.NoStreamResponseError
        ack = json.loads(answer.data)
        if "error" in ack:
            raise nats.js.errors.APIError.from_error(ack["error"])
        if ack.get("stream") != streams.EVENTS or ack.get("domain", "") != self._expected_domain:
            raise WrongStream(f"acknowledged by stream {ack.get('stream')!r} of domain {ack.get('domain')!r}")
        return int(ack["seq"])

    # --------------------------------------------------------------------------------------------------------- compare

    async def _compare(self) -> None:
        """Compares the outbox with the stream, and makes pending exactly what the stream hasn't got."""
        generation = self._connection.generation
        await streams.ensure_events(self._js)
        self._expected_domain = (await self._js.account_info()).domain or ""
        last, known = await self._last_event()
        if last is None:
            info = await self._js.stream_info(streams.EVENTS)
            published, lost = 0, self._outbox.lost_since(info.state.first_seq) if not known else 0
        else:
            published, lost = self._outbox.settle(last)
        self._compared = generation
        if published or lost:
            log.info("relay.compared", already_published=published, lost_by_the_stream=lost)

    async def _last_event(self) -> tuple[EventId | None, bool]:
        """This outbox's last event in the stream; and whether the stream was searched for it, where it has none."""
        pattern = subjects.event_pattern(self._db.node, service=self._service.name)
        try:
            message = await self._js.get_last_msg(streams.EVENTS, pattern)
        except nats.js.errors.NotFoundError:
            return None, False
        last = EventId.parse((message.headers or {}).get(Header.MSG_ID, ""))
        if last is not None and last.outbox == self._outbox.id:
            return last, True
        if self._outbox.is_new():
            return None, True
        # The last event is another outbox's: this database was restored after one that had been made anew. Ours are
        # somewhere before, or nowhere.
        found: EventId | None = None
        async for _, headers in read_headers(self._js, streams.EVENTS, pattern, self._outbox.oldest_acknowledged()):
            id = EventId.parse(headers.get(Header.MSG_ID, ""))
            if id is not None and id.outbox == self._outbox.id and (found is None or id > found):
                found = id
        return found, False
