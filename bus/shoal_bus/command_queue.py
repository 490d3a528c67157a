"""A dispatcher's consumer of the stream of commands."""

from __future__ import annotations

from contextlib import suppress

import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from shoal_bus import streams, subjects
from shoal_bus.connection import Connection
from shoal_bus.pull import Puller

HELD = 4096
"""Commands delivered and not acknowledged; the next ones stay in the stream."""
ACK_SECONDS = 5.0
_ACK_WAIT_SECONDS = 24 * 3600.0  # what isn't acknowledged comes again with a new consumer, not by a timer
_BATCH, _BATCH_BYTES = 64, 32 << 20


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
