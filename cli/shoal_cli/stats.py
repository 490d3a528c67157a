"""`shoal stats`: what containers use, from two looks at their counters."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.errors import FailedPrecondition

from shoal_cli.output import print_json, print_table, size

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("CONTAINER", "CPU %", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS")
_ABSENT = "--"
_MOST_FILTERS = 256

Figures = dict[str, Any]
"""One container's: `cpu_percent` (100 is one CPU; None at the first look), bytes, and None where there is no figure."""


def figures(before: runtime.ContainerMetrics | None, now: runtime.ContainerMetrics) -> Figures:
    """What a table or a program is told of a container that was looked at twice, or, for the first time, once."""
    memory, pids, devices = now.memory, now.pids, now.blkio.devices if now.blkio is not None else []
    limit = min(memory.limit or memory.host, memory.host) if memory is not None else None
    return {
        "container_id": now.container_id,
        "at": now.at.isoformat(),
        "cpu_percent": _cpu_percent(before, now),
        "memory": {
            "usage": memory.working_set if memory is not None else None,
            "limit": limit,
            "percent": 100 * memory.working_set / limit if memory is not None and limit else None,
        },
        "block_io": {
            "read": sum(device.read_bytes for device in devices) if now.blkio is not None else None,
            "write": sum(device.write_bytes for device in devices) if now.blkio is not None else None,
        },
        "pids": {
            "current": pids.current if pids is not None else None,
            "limit": pids.limit if pids is not None else None,
        },
    }


def _cpu_percent(before: runtime.ContainerMetrics | None, now: runtime.ContainerMetrics) -> float | None:
    # Another first process is another task, whose counters began anew.
    if before is None or before.pid != now.pid or before.cpu is None or now.cpu is None or now.clock <= before.clock:
        return None
    return max(0.0, 100 * (now.cpu.usage - before.cpu.usage) / (now.clock - before.clock))


def row(found: Figures) -> tuple[str, ...]:
    """The cells of one container."""
    memory, block = found["memory"], found["block_io"]
    return (
        found["container_id"],
        _percent(found["cpu_percent"]),
        f"{_size(memory['usage'])} / {_size(memory['limit'])}",
        _percent(memory["percent"]),
        f"{_size(block['read'])} / {_size(block['write'])}",
        _ABSENT if found["pids"]["current"] is None else str(found["pids"]["current"]),
    )


def _percent(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.2f}%"


def _size(value: int | None) -> str:
    return _ABSENT if value is None else size(value)


async def look(client: Client, ids: Sequence[str]) -> dict[str, runtime.ContainerMetrics]:
    """The metrics of the containers `ids`, or of all, by id."""
    filters = [f'id=="{id}"' for id in ids] if len(ids) <= _MOST_FILTERS else []
    items = await client.collect(runtime.TASK_METRICS, runtime.ListMetrics(filters=filters, raw=False))
    return {item.container_id: item for item in items if not ids or item.container_id in ids}


async def require_running(client: Client, ids: Sequence[str]) -> None:
    """NOT_FOUND or FAILED_PRECONDITION for the first of `ids` of which there can be no figures."""
    for id in ids:
        task = await client.call(runtime.TASK_GET, runtime.ProcessRequest.of({"container_id": id}))
        if task.status == "stopped":
            raise FailedPrecondition(f"container {id}: its task has stopped", hint="see `shoal ps -a`")


async def watch(client: Client, ids: Sequence[str], interval: float) -> AsyncGenerator[list[Figures], None]:
    """The figures every `interval` seconds, at first without CPU. Ends when none of the containers named is left."""
    before: dict[str, runtime.ContainerMetrics] = {}
    while True:
        now = await look(client, ids)
        if ids and not now:
            return
        yield [figures(before.get(id), item) for id, item in now.items()]
        before = now
        await asyncio.sleep(interval)


async def show(client: Client, ids: Sequence[str], *, interval: float, stream: bool | None, as_json: bool) -> None:
    """Prints figures: live on a terminal, once elsewhere, unless `stream` says which."""
    await require_running(client, ids)
    terminal = sys.stdout.isatty() and not as_json
    async with aclosing(watch(client, ids, interval)) as looks:
        if stream is False or (stream is None and not terminal):
            found: list[Figures] = []
            for _ in range(2):
                found = await anext(looks, [])
            _print(found, as_json)
        elif terminal:
            await _live(looks)
        else:
            await anext(looks, None)
            async for found in looks:
                _print(found, as_json)
                sys.stdout.flush()


def _print(found: Sequence[Figures], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        print_table(COLUMNS, [row(one) for one in found])


async def _live(looks: AsyncIterator[list[Figures]]) -> None:
    from rich.live import Live

    with Live(_table([]), auto_refresh=False) as live:
        async for found in looks:
            live.update(_table(found), refresh=True)


def _table(found: Sequence[Figures]) -> Table:
    from rich.table import Table

    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.no_wrap = True
    for one in found:
        table.add_row(*row(one))
    return table
