"""The clock of the server that keeps a stream: the one that stamps its messages."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta

from nats.js import JetStreamContext

from shoal_bus.connection import Connection

_ANSWER_SECONDS = 5.0
_KEEP_SECONDS = 5.0


class ServerClock:
    """The time there. The stream's own info says it (`ts`); the stream must be there.

    Between two questions the time that has passed is counted on this machine (CLOCK_BOOTTIME: setting the clock doesn't
    touch it, a suspended machine's time counts).
    """

    def __init__(self, connection: Connection, stream: str, *, domain: str = "") -> None:
        self._subject = f"{JetStreamContext(connection, domain=domain or None)._prefix}.STREAM.INFO.{stream}"
        self._connection = connection
        self._generation = -1
        self._asked = self._answered = 0.0
        self._then = datetime.min

    async def now(self) -> datetime:
        """The time there, or a little later."""
        await self._ask()
        return self._then + timedelta(seconds=passing() - self._asked)

    async def at(self, moment: float) -> datetime:
        """The time there at a moment of this machine (of `passing`), or a little earlier."""
        await self._ask()
        return self._then - timedelta(seconds=self._answered - moment)

    async def _ask(self) -> None:
        asked = passing()
        if self._generation == self._connection.generation and asked - self._asked <= _KEEP_SECONDS:
            return
        generation = self._connection.generation
        message = await self._connection.while_up(self._connection.request(self._subject, timeout=_ANSWER_SECONDS))
        self._then = datetime.fromisoformat(json.loads(message.data)["ts"])
        self._asked, self._answered, self._generation = asked, passing(), generation


def passing() -> float:
    """Seconds that go on whatever happens to this machine's clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
