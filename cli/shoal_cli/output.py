"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from shoal_bus.message import Message

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_AGES = ((86400, "d"), (3600, "h"), (60, "min"))


def print_json(value: Any) -> None:
    """One JSON document; on a terminal indented, else on one line."""
    indent = 2 if sys.stdout.isatty() else None
    print(json.dumps(plain(value), indent=indent, ensure_ascii=False, default=str))


def plain(value: Any) -> Any:
    """Messages, and lists and maps of them, as JSON has them: times as RFC 3339."""
    if isinstance(value, Message):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns under their heads, aligned; nothing is cut off, whatever the terminal's width."""
    table = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(head), *(len(row[i]) for row in table)]) for i, head in enumerate(columns)]
    heads = "  ".join(head.ljust(width) for head, width in zip(columns, widths, strict=True)).rstrip()
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        Console().print(Text(heads, style="bold"), soft_wrap=True)
    else:
        print(heads)
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """Text that came from elsewhere, without anything that a terminal would take for a command."""
    return "".join(c if c.isprintable() else " " for c in text)


def size(count: float) -> str:
    """Bytes as people read them: `1.4 MiB`."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def age(since: datetime | None) -> str:
    """How long ago: `35 s`, `12 min`, `3 h`, `9 d`."""
    if since is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - since).total_seconds()))
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def short(digest: str) -> str:
    """The first twelve digits of a digest."""
    return digest.partition(":")[2][:12]
