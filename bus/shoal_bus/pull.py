"""A pull consumer that delivers at once: one request outstanding, renewed before it runs out, silence noticed.

nats-py's `fetch` waits for a whole batch once its first message has come; this hands over what there is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

BATCH = 512
EXPIRES_SECONDS = 30.0
HEARTBEAT_SECONDS = 2.0
_FORGOTTEN_SECONDS = 60.0
_ANSWER_SECONDS = 5.0


class Silent(Exception):
    """The server says nothing any more, or that the consumer is gone: a new one is needed."""


class Puller:
    """An ephemeral consumer of one stream, without acknowledgements."""

    def __init__(self, js: JetStreamContext, stream: str) -> None:
        self._js, self._stream = js, stream
        self._nc: Any = js._nc
        self._subscription: Subscription | None = None
        self._name = ""
        self._asked = 0

    async def open(
        self,
        patterns: Sequence[str],
        *,
        start: int | None = None,
        since: datetime | None = None,
        headers_only: bool = False,
    ) -> int:
        """Begins at a sequence or a time; returns how many messages are there already."""
        await self.close()
        policy = DeliverPolicy.BY_START_SEQUENCE if since is None else DeliverPolicy.BY_START_TIME
        config = ConsumerConfig(
            deliver_policy=policy,
            opt_start_seq=max(1, start or 1) if since is None else None,
            opt_start_time=None if since is None else since.astimezone(UTC),
            ack_policy=AckPolicy.NONE,
            inactive_threshold=_FORGOTTEN_SECONDS,
            filter_subject=patterns[0] if len(patterns) == 1 else None,
            filter_subjects=list(patterns) if len(patterns) > 1 else None,
            headers_only=headers_only or None,
            mem_storage=True,
            num_replicas=1,
        )
        info = await self._js.add_consumer(self._stream, config)
        self._name = info.name
        self._subscription = await self._nc.subscribe(self._nc.new_inbox())
        self._asked = 0
        return int(info.num_pending or 0)

    async def close(self) -> None:
        """Ends it; the server forgets the consumer by itself if it can't be told."""
        if self._subscription is None:
            return
        subscription, self._subscription = self._subscription, None
        with suppress(nats.errors.Error, nats.js.errors.Error, TimeoutError):
            await subscription.unsubscribe()
            if self._nc.is_connected:
                async with asyncio.timeout(1):
                    await self._js.delete_consumer(self._stream, self._name)

    async def next(self) -> list[Msg]:
        """What has come, at least one message, or an empty list where nothing has for a while. Raises `Silent`."""
        subscription = self._subscription
        if subscription is None:
            raise Silent
        if self._asked <= 0:
            await self._ask(subscription)
        messages: list[Msg] = []
        queue = subscription._pending_queue
        try:
            async with asyncio.timeout(2 * HEARTBEAT_SECONDS + 1):
                message = await queue.get()
        except TimeoutError:
            raise Silent("no heartbeat") from None
        while True:
            queue.task_done()
            subscription._pending_size -= len(message.data)
            if self._is_event(message):
                self._asked -= 1
                messages.append(message)
            if queue.empty():
                return messages
            message = queue.get_nowait()

    async def _ask(self, subscription: Subscription) -> None:
        request = {
            "batch": BATCH,
            "expires": int(EXPIRES_SECONDS * 1e9),
            "idle_heartbeat": int(HEARTBEAT_SECONDS * 1e9),
        }
        self._asked = BATCH
        subject = f"{self._js._prefix}.CONSUMER.MSG.NEXT.{self._stream}.{self._name}"
        await self._nc.publish(subject, json.dumps(request).encode(), subscription.subject)

    def _is_event(self, message: Msg) -> bool:
        status = (message.headers or {}).get("Status", "")
        if not status:
            return True
        if status == "408" or (status == "409" and "Batch Completed" in (message.headers or {}).get("Description", "")):
            self._asked = 0  # the request ran out; the next one follows
        elif status != "100":
            raise Silent(f"{status} {(message.headers or {}).get('Description', '')}")
        return False


async def read_headers(
    js: JetStreamContext, stream: str, pattern: str, start: int
) -> AsyncIterator[tuple[int, dict[str, str]]]:
    """Sequence and headers of every message that is in the stream now, from `start` on."""
    puller = Puller(js, stream)
    left = await puller.open([pattern], start=start, headers_only=True)
    try:
        while left > 0:
            for message in await puller.next():
                left -= 1
                yield message.metadata.sequence.stream, dict(message.headers or {})
    finally:
        await puller.close()
