"""Requests from what people write on a command line."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from shoal_bus.errors import InvalidArgument
from shoal_bus.restart import Policy

if TYPE_CHECKING:
    from shoal_bus.api.content import ChangeLease

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def environment(given: list[str]) -> list[str]:
    """`KEY=VALUE` as it is; `KEY` alone with its value here, or left out where it has none (as docker does)."""
    found = []
    for entry in given:
        key, equals, _ = entry.partition("=")
        if not key:
            raise InvalidArgument(f"--env {entry!r}: must be KEY=VALUE or KEY")
        if equals:
            found.append(entry)
        elif key in os.environ:
            found.append(f"{key}={os.environ[key]}")
    return found


def labels(given: list[str]) -> dict[str, str]:
    """`KEY=VALUE` entries as a map."""
    found = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        if not key or not equals:
            raise InvalidArgument(f"--label {entry!r}: must be KEY=VALUE")
        found[key] = value
    return found


def expiry(text: str) -> str:
    """The time, as RFC 3339 has it, that is `90s`, `10m` or `24h` away."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.isascii() or not number.isdecimal() or len(number) > 9:
        raise InvalidArgument(f"--expire {text!r}: must be a number and s, m, h or d", hint="as 24h, or never")
    at = datetime.now(UTC) + timedelta(seconds=int(number) * _UNITS[unit])
    return at.isoformat(timespec="seconds")


def lease_resource(lease: str, text: str) -> ChangeLease:
    """A resource of a lease, from `TYPE=ID`."""
    from shoal_bus.api.content import ChangeLease

    type, equals, id = text.partition("=")
    if not equals:
        raise InvalidArgument(f"resource {text!r}: must be TYPE=ID", hint="as content=sha256:…, or images=NAME")
    return ChangeLease.of({"lease": lease, "type": type, "id": id})


def network(mode: str, ip: str, gateway: str, bridge: str) -> dict[str, Any]:
    """A run's network, its options checked against one another."""
    if mode not in ("none", "host", "bridge"):
        raise InvalidArgument(f"--net {mode!r}: must be none, host or bridge")
    if mode != "bridge":
        if ip or gateway:
            raise InvalidArgument(f"--ip and --gateway go with --net bridge, not with {mode}")
        return {"mode": mode}
    if not ip:
        raise InvalidArgument(
            "--net bridge needs --ip", hint="as --ip 10.88.0.2/24: allocating addresses is left to you"
        )
    return {"mode": mode, "address": ip, "gateway": gateway, "bridge": bridge}


def restart_policy(given: str, *, remove: bool) -> str:
    """A restart policy, which doesn't go with a container that is removed at its exit."""
    try:
        policy = str(Policy.parse(given))
    except ValueError as error:
        raise InvalidArgument(f"--restart: {error}") from None
    if remove and policy != "no":
        raise InvalidArgument("--rm and --restart: what is removed at its exit can't be started again")
    return policy


def signal_number(given: str) -> int:
    """The number of a signal by number or name, with or without SIG."""
    if given.isdecimal() and 0 < int(given) <= signal.SIGRTMAX:
        return int(given)
    name = given.upper().removeprefix("SIG")
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        raise InvalidArgument(f"--signal {given!r}: no such signal", hint="as TERM, SIGTERM or 15") from None
