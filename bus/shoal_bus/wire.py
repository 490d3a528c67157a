"""How requests and replies are laid into NATS messages: header names, and replies in parts.

A request carries the id under which it is done once, the time its caller still waits (as gRPC does: clocks differ) and
the W3C trace context. A reply is one message, or, when it can grow, a sequence of parts: the bytes of one or more
concatenated msgpack values, cut anywhere, each part below the server's `max_payload`. Each part's reply subject takes
its acknowledgement; a sender runs at most `WINDOW` parts ahead. The last one carries `Shoal-End` with the number of
parts, and an error's headers where the sequence broke off.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping
from urllib.parse import quote, unquote

from shoal_bus.errors import InvalidArgument, ShoalError, from_wire

REQUEST_ID = "Shoal-Request-Id"
TIMEOUT = "Shoal-Timeout"
"""Milliseconds the caller still waits."""
EXPIRES = "Shoal-Expires"
"""Of a durable command: seconds, from when its stream stored it, after which it is no longer begun."""
SEEN = "Shoal-Seen"
"""The version of an operation's progress that the caller has already."""
AGAIN = "Shoal-Again"
"""In a reply: not finished; ask again with the same id. Its value is the version of the progress in the payload."""
PART = "Shoal-Part"
END = "Shoal-End"
HINT = "Shoal-Hint"
ERROR_CODE = "Nats-Service-Error-Code"
ERROR = "Nats-Service-Error"
LEASE = "Shoal-Lease"
"""The lease that what this request makes is added to, percent-encoded."""
TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

NO_RESPONDERS = "503"
"""The status of the server's own answer where nobody listens."""
STOP = b"stop"
"""An acknowledgement that says that no more parts are wanted."""
WINDOW = 8
HEADROOM = 4096
"""What headers may take of a message's `max_payload`."""
LARGEST_PART = 512 * 1024
PART_IDLE_SECONDS = 10.0
"""A sequence without a part for so long is given up by either side; senders say something three times as often."""
POLL_SECONDS = 10.0
"""How long a service keeps a request that waits before it says `Shoal-Again`."""
OPERATION_POLL_SECONDS = 2.0
"""The same of an operation: few at a time, so that a dead owner is found out soon."""

LONGEST_LEASE = 256
_HEADER_LIMIT = 1000


def new_id() -> str:
    """An id for a request that changes something."""
    return secrets.token_hex(12)


def part_size(max_payload: int) -> int:
    """The bytes of a reply that go into one message."""
    return max(1024, min(max_payload - HEADROOM, LARGEST_PART))


def error_headers(error: ShoalError) -> dict[str, str]:
    """The headers that carry an error."""
    headers = {ERROR_CODE: error.code.name, ERROR: _header(error.message)}
    if error.hint:
        headers[HINT] = _header(error.hint)
    return headers


def error_of(headers: Mapping[str, str]) -> ShoalError | None:
    """The error a reply carries, if it does."""
    if (code := headers.get(ERROR_CODE)) is None:
        return None
    return from_wire(code, headers.get(ERROR, ""), headers.get(HINT, ""))


def timeout_of(headers: Mapping[str, str]) -> float | None:
    """Seconds the caller still waits, or None where it doesn't say."""
    try:
        return max(0.0, int(headers[TIMEOUT]) / 1000)
    except (KeyError, ValueError):
        return None


def lease_of(headers: Mapping[str, str]) -> str:
    """The lease a request is made under, or nothing. INVALID_ARGUMENT for what is none."""
    lease = unquote(headers.get(LEASE, ""))
    if len(lease) > LONGEST_LEASE or not (lease.isprintable() or not lease):
        raise InvalidArgument(f"the lease must be printable, and of at most {LONGEST_LEASE} characters")
    return lease


def lease_header(lease: str) -> dict[str, str]:
    """The header that carries a lease, if there is one."""
    return {LEASE: quote(lease, safe="")} if lease else {}


def child_traceparent(parent: str) -> str:
    """A new span in the caller's trace, or of a new trace (https://www.w3.org/TR/trace-context/)."""
    fields = parent.split("-")
    # Nobody has to be unable to guess them: without asking the kernel they cost a third.
    trace = fields[1] if len(fields) == 4 and len(fields[1]) == 32 else f"{random.getrandbits(128):032x}"
    flags = fields[3] if len(fields) == 4 else "01"
    return f"00-{trace}-{random.getrandbits(64):016x}-{flags}"


def _header(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _HEADER_LIMIT else text[: _HEADER_LIMIT - 1] + "…"
