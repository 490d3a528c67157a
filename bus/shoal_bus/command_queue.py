"""What a dispatcher needs of the server: its consumer of the stream of commands, and the server's clock."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import datetime, timedelta

import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from shoal_bus import streams, subjects
from shoal_bus.commands import Command
from shoal_bus.connection import Connection
from shoal_bus.pull import Puller

HELD = 4096
"""Commands delivered and not acknowledged; the next ones stay in the stream."""
ACK_SECONDS = 5.0
_ACK_WAIT_SECONDS = 24 * 3600.0  # what isn't acknowledged comes again with a new consumer, not by a timer
_BATCH, _BATCH_BYTES = 64, 32 << 20
_CLOCK_SECONDS = 5.0


class CommandQueue(Puller):
    """The node's consumer of the stream of commands, `dispatcher-<node>`, with explicit acknowledgements.

    It is made anew each time: the server then delivers everything that isn't acknowledged from the beginning, in the
    stream's order. Left to an old consumer's timers, a container's newer command would overtake those that its
    predecessor had taken.
    """

    def __init__(self, js: JetStreamContext, connection: Connection, node: str) -> None:
        super().__init__(js, streams.COMMANDS)
        self._connection, self._node = connection, node
        # As many as nats-py keeps without dropping any, however large they are.
        self._batch = max(1, min(_BATCH, _BATCH_BYTES // max(1, connection.max_payload)))

    async def renew(self) -> None:
        """Begins at the oldest command that isn't acknowledged."""
        await self.close()
        await streams.ensure_commands(self._js)
        name = f"dispatcher-{self._node}"
        with suppress(nats.js.errors.NotFoundError):
            await self._js.delete_consumer(self._stream, name)
        config = ConsumerConfig(
            durable_name=name,
            description=f"Carries out the commands of node {self._node}",
            filter_subject=subjects.command_pattern(self._node),
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=_ACK_WAIT_SECONDS,
            max_ack_pending=HELD,
        )
        await self._js.add_consumer(self._stream, config)
        self._name = name
        self._subscription = await self._nc.subscribe(self._nc.new_inbox())
        self._asked = 0

    async def acknowledge(self, ack: str) -> None:
        """Has the server forget a command, and returns when it has."""
        await self._connection.while_up(self._connection.request(ack, b"+ACK", timeout=ACK_SECONDS))


class ServerClock:
    """The clock of the server that keeps the stream: the one that stamped its messages.

    The stream's own info says what time it is there (`ts`). Between two questions the time that has passed is counted
    on this machine (CLOCK_BOOTTIME: setting the clock doesn't touch it, a suspended machine's time counts).
    """

    def __init__(self, js: JetStreamContext, connection: Connection) -> None:
        self._subject = f"{js._prefix}.STREAM.INFO.{streams.COMMANDS}"
        self._connection = connection
        self._generation = -1
        self._asked = 0.0
        self._then = datetime.min

    async def passed(self, command: Command) -> bool:
        """Whether a command's time is up."""
        if command.expires is None:
            return False
        return (await self.now() - command.submitted).total_seconds() > command.expires

    async def now(self) -> datetime:
        """The time there."""
        present = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self._generation != self._connection.generation or present - self._asked > _CLOCK_SECONDS:
            generation = self._connection.generation
            message = await self._connection.while_up(self._connection.request(self._subject, timeout=ACK_SECONDS))
            self._then = datetime.fromisoformat(json.loads(message.data)["ts"])
            self._asked, self._generation = present, generation
        return self._then + timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME) - self._asked)
