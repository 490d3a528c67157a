"""The JetStream streams: one of events, one of durable commands; found, or made where nobody has."""

from __future__ import annotations

import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from shoal_bus import subjects

EVENTS = "SHOAL_EVENTS"
COMMANDS = "SHOAL_COMMANDS"
EVENTS_KEPT_SECONDS = 7 * 24 * 3600.0
EVENTS_KEPT_BYTES = 1 << 30
COMMANDS_KEPT_BYTES = 1 << 30
DUPLICATE_WINDOW_SECONDS = 120.0


async def ensure_events(js: JetStreamContext) -> None:
    """Makes the stream of events where there is none; one that an operator made stays as it is."""
    await _ensure(
        js,
        StreamConfig(
            name=EVENTS,
            description="Lifecycle events of shoal's services",
            subjects=[f"{subjects.ROOT}.*.*.{subjects.EVENT}.>"],
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.OLD,
            storage=StorageType.FILE,
            max_age=EVENTS_KEPT_SECONDS,
            max_bytes=EVENTS_KEPT_BYTES,
            duplicate_window=DUPLICATE_WINDOW_SECONDS,
            allow_direct=True,
        ),
    )


async def ensure_commands(js: JetStreamContext) -> None:
    """Makes the stream of durable commands where there is none; one that an operator made stays as it is.

    A work queue: a command stays until its node's dispatcher has acknowledged it, however long that node is away. When
    the stream is full, a new command is refused: none that was taken is dropped.
    """
    await _ensure(
        js,
        StreamConfig(
            name=COMMANDS,
            description="Durable commands for shoal's nodes",
            subjects=[subjects.command_pattern()],
            retention=RetentionPolicy.WORK_QUEUE,
            discard=DiscardPolicy.NEW,
            storage=StorageType.FILE,
            max_bytes=COMMANDS_KEPT_BYTES,
            duplicate_window=DUPLICATE_WINDOW_SECONDS,
        ),
    )


async def _ensure(js: JetStreamContext, config: StreamConfig) -> None:
    assert config.name is not None
    try:
        await js.stream_info(config.name)
    except nats.js.errors.NotFoundError:
        try:
            await js.add_stream(config)
        except nats.js.errors.BadRequestError:
            await js.stream_info(config.name)  # another copy was faster
