"""What all processes share: subjects, messages, errors, the harness of services, the client."""

from shoal_bus.lazy import lazily

# nats-py loads it for its WebSocket transport; where nobody connects by one, it would be ten megabytes of every
# process, and half the time that a command takes.
lazily("aiohttp")
