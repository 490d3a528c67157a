"""Which services answer on a node, for who asks often: whoever once was there is awaited, and nobody else is."""

from __future__ import annotations

from collections.abc import Collection

import nats.errors
from nats.aio.msg import Msg

from shoal_bus import discovery, subjects
from shoal_bus.connection import Connection
from shoal_bus.errors import Unavailable


class Neighbours:
    """The services of one node: `services` are always awaited, others once they have been there.

    One that comes says so when it is ready; one that doesn't answer is forgotten.
    """

    def __init__(self, connection: Connection, node: str, services: Collection[str]) -> None:
        self._connection, self._node, self._services = connection, node, frozenset(services)
        self._further: set[str] | None = None
        """What is there besides; None where that isn't known."""
        self._heard: set[str] = set()
        """What said that it is ready meanwhile."""
        self._listening, self._losses = False, 0
        self.arrivals = 0
        """Rises when one says that it is ready, or the bus was away."""
        connection.on_reconnect(self._forget)  # who was ready meanwhile wasn't heard

    async def answering(self, seconds: float) -> set[str]:
        """The names of the services that answer now, after `seconds` at most. UNAVAILABLE where the bus isn't there."""
        await self._listen()
        before, losses = self._further, self._losses
        if before is None:
            answers = await discovery.ping(self._connection, self._node, awaited=self._services, seconds=seconds)
        else:
            awaited = self._services | before | self._heard
            answers = await discovery.ping(self._connection, self._node, awaited=awaited, seconds=seconds, further=0.0)
        found = {one.name for one in answers}
        if losses == self._losses:
            silent = (before or set()) - found
            self._further = ((self._further or set()) - silent) | self._heard | found - self._services
            self._heard = set()
        return found

    async def _listen(self) -> None:
        if self._listening:
            return
        try:
            await self._connection.listen(subjects.announcements(self._node), self._hear)
        except nats.errors.Error as error:
            raise Unavailable("the bus isn't there", hint="is nats-server running?") from error
        self._listening = True

    def _hear(self, message: Msg) -> None:
        self._heard |= {message.subject.split(".")[-2]} - self._services
        self.arrivals += 1

    def _forget(self) -> None:
        self._further, self._losses = None, self._losses + 1
        self.arrivals += 1
