"""Events that clients publish: one row in the outbox, told with the service's own and in order with them."""

from __future__ import annotations

import time

from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.message import Empty

LOCK = "published"
"""What a publication changes: nothing but the outbox, which keeps the order in which they were committed."""
_SECOND = 10**9


class Published:
    """Clients' events, of any topic."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def publish(self, ctx: Context, request: api.PublishEvent) -> Empty:
        """Commits an event. RESOURCE_EXHAUSTED for one that no message of the bus can carry."""
        seconds, nanos = request.seconds, request.nanos
        if seconds is None:
            seconds, nanos = divmod(time.time_ns(), _SECOND)
        event = api.EventPublished(
            topic=request.topic, type_url=request.type_url, value=request.value, seconds=seconds, nanos=nanos
        )
        with self._db.write() as tx:
            tx.emit(ctx.namespace, api.EVENTS_PUBLISHED, event)
            ctx.answer(tx, Empty())
        return Empty()
