"""`shoal events`: a subscriber of the event stream."""

from __future__ import annotations

import json
import re
import sys
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Self

from shoal_bus import subjects
from shoal_bus.api import content, network, runtime, snapshot
from shoal_bus.client import Client
from shoal_bus.consumer import read_events
from shoal_bus.errors import InvalidArgument
from shoal_bus.events import Event, Topic
from shoal_bus.message import now

_AGO = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_KEYS = ("topic", "id", "service", "namespace")


def services_of_topics() -> dict[str, str]:
    """Which service tells of which topic."""
    values = [value for module in (content, network, runtime, snapshot) for value in vars(module).values()]
    return {value.name: value.service for value in values if isinstance(value, Topic)}


def parse_since(text: str) -> datetime | None:
    """A time: RFC 3339, or how long ago (`90s`, `10m`, `2h`, `1h30m`); None for no text."""
    if not text:
        return None
    parts = _AGO.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return now() - timedelta(seconds=sum(float(number) * _SECONDS[unit] for number, unit in parts))
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(
            f"--since {text!r}: neither a time nor a duration", hint="as 2026-01-31T12:00:00Z or 10m"
        ) from None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Wanted:
    """Which events: any of the values of each key; an empty tuple takes them all."""

    namespace: tuple[str, ...] = ()
    topic: tuple[str, ...] = ()
    service: tuple[str, ...] = ()
    id: tuple[str, ...] = ()
    all_nodes: bool = field(default=False)

    @classmethod
    def parse(cls, filters: list[str], namespace: str, *, all_namespaces: bool, all_nodes: bool) -> Self:
        """From `key=value` filters. Where they name no namespace, it is `namespace`."""
        given: dict[str, list[str]] = {key: [] for key in _KEYS}
        for entry in filters:
            key, _, value = entry.partition("=")
            if key not in given or not value:
                raise InvalidArgument(f"--filter {entry!r}: must be one of {', '.join(f'{k}=…' for k in _KEYS)}")
            given[key].append("/" + value.strip("/") if key == "topic" else value)
        if not given["namespace"] and not all_namespaces:
            given["namespace"] = [namespace]
        return cls(**{key: tuple(values) for key, values in given.items()}, all_nodes=all_nodes)

    def patterns(self, node: str) -> list[str]:
        """What to ask the stream for: as narrow as subjects can say it; `matches` does the rest."""
        where = "" if self.all_nodes else node
        known = services_of_topics()
        for topic in self.topic:
            if topic not in known:
                raise InvalidArgument(f"topic {topic}: there is none", hint=f"one of {', '.join(sorted(known))}")
        patterns = []
        for namespace in self.namespace or ("",):
            if self.topic:
                patterns += [
                    subjects.event_pattern(where, namespace, known[topic], topic, id)
                    for topic in dict.fromkeys(self.topic)
                    for id in dict.fromkeys(self.id) or ("",)
                ]
            else:
                patterns += [subjects.event_pattern(where, namespace, s) for s in dict.fromkeys(self.service) or ("",)]
        return patterns

    def matches(self, event: Event) -> bool:
        """Whether an event that the patterns let through is one of them."""
        return (not self.id or event.id in self.id) and (not self.service or event.service in self.service)


async def print_events(client: Client, wanted: Wanted, *, since: str, follow: bool, as_json: bool) -> None:
    """Prints events as they come, a line each, until interrupted (or to the stream's end, without `follow`)."""
    patterns = wanted.patterns(client.node)
    begin = parse_since(since)
    if begin is None and not follow:
        begin = datetime.fromtimestamp(0, UTC)
    async with aclosing(read_events(client.connection, patterns, since=begin, follow=follow)) as events:
        async for received in events:
            if wanted.matches(received.event):
                line = _json(received.event, received.sequence) if as_json else _text(received.event)
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()


def _json(event: Event, sequence: int) -> str:
    return json.dumps({**event.model_dump(mode="json"), "sequence": sequence}, ensure_ascii=False)


def _text(event: Event) -> str:
    time = event.timestamp.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    payload = json.dumps(Event.model_dump(event, mode="json")["payload"], ensure_ascii=False)
    return f"{time}  {event.node}  {event.namespace or '-'}  {event.topic}  {payload}"
