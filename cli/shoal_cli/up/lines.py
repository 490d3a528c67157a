"""What the processes of a node say, as one stream of lines: for people on a terminal, as JSON everywhere else."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_NATS_LEVELS = {
    "[TRC]": "debug",
    "[DBG]": "debug",
    "[INF]": "debug",
    "[WRN]": "warning",
    "[ERR]": "error",
    "[FTL]": "error",
}
_EXPECTED = "Plaintext passwords detected"  # made for this start alone, in a file that only root reads
_COLOURS = {"bus": 90, "content": 36, "snapshot": 35, "runtime": 32, "network": 34, "gateway": 33, "up": 97}
_LEVEL_COLOURS = {"warning": 33, "error": 31, "critical": 31}
_WIDTH = 8


class Heard(NamedTuple):
    """Of a line: which service speaks (a process may host several), and its event or text."""

    service: str
    event: str


class Lines:
    """Standard error as a node's log: lines below `level` are left out."""

    def __init__(self, level: str = "info", *, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._pretty = self._out.isatty()
        self._threshold = LEVELS.get(level, LEVELS["info"])

    def say(self, event: str, level: str = "info", **fields: Any) -> None:
        """A line of `shoal up` itself."""
        record = {"service": "up", "level": level, "timestamp": _now(), "event": event, **fields}
        self._write("up", record)

    def take(self, name: str, line: bytes) -> Heard:
        """Passes on a line of a process; returns what it says."""
        record = _parse(name, line)
        self._write(name, record)
        return Heard(str(record.get("service", "")), str(record.get("event", "")))

    def _write(self, name: str, record: dict[str, Any]) -> None:
        level = str(record.get("level", "info"))
        if LEVELS.get(level, 20) < self._threshold:
            return
        text = _pretty(name, level, record) if self._pretty else json.dumps(record, default=str)
        with suppress(OSError):  # a full disk, or nobody who reads: the node goes on without
            self._out.write(f"{text}\n")
            self._out.flush()


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _parse(name: str, line: bytes) -> dict[str, Any]:
    text = line.decode(errors="replace").rstrip()
    if text.startswith("{"):
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if isinstance(record, dict):
            return {"service": name, **record}
    level = "warning"  # a service that doesn't log but write says why it can't go on
    if name == "bus":
        tag = next((word for word in text.split()[:5] if word in _NATS_LEVELS), "")
        level, text = _NATS_LEVELS.get(tag, "error"), text.partition(f"{tag} ")[2] if tag else text
        if text.startswith(_EXPECTED):
            level = "debug"
    return {"service": name, "level": level, "timestamp": _now(), "event": text}


def _pretty(name: str, level: str, record: dict[str, Any]) -> str:
    left_out = {"service", "level", "timestamp", "event", "exception"}
    fields = " ".join(f"\x1b[2m{key}=\x1b[0m{value}" for key, value in record.items() if key not in left_out)
    time = str(record.get("timestamp", ""))[11:19]
    event = str(record.get("event", ""))
    if level in _LEVEL_COLOURS:
        event = f"\x1b[{_LEVEL_COLOURS[level]}m{event}\x1b[0m"
    head = f"\x1b[{_COLOURS.get(name, 37)}m{name:<{_WIDTH}}\x1b[0m \x1b[2m{time}\x1b[0m"
    trace = f"\n{record['exception']}" if "exception" in record else ""
    return f"{head} {event} {fields}".rstrip() + trace
