"""Containers with restart policies, for tests: their labels, and the lives that events tell of."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from shoal_bus import restart
from shoal_bus.api import runtime as api

from tests.support.runtime import RuntimeNode

AGAIN = ["/tasks/delete", "/tasks/create", "/tasks/start", "/tasks/exit"]
"""From one exit to the next."""


@dataclass(frozen=True)
class Life:
    """One process of a container that has been started and has ended."""

    pid: int
    exit_status: int
    began: datetime
    ended: datetime


def policy(text: str) -> dict[str, str]:
    """The labels nerdctl leaves on a container that it has started."""
    return {restart.POLICY: text, restart.STATUS: restart.RUNNING, restart.EXPLICITLY_STOPPED: "false"}


def lives(node: RuntimeNode, id: str) -> list[Life]:
    """Every life of a container that has been told of from beginning to end."""
    found: list[Life] = []
    began: tuple[int, datetime] | None = None
    for event in node.events:
        if event.id == id and event.topic == "/tasks/start":
            began = event.payload["pid"], event.timestamp
        elif event.id == id and event.topic == "/tasks/exit" and began is not None:
            pid, status = event.payload["pid"], event.payload["exit_status"]
            assert pid == began[0]
            found.append(Life(pid, status, began[1], event.payload["exited_at"]))
            began = None
    return found


async def update(node: RuntimeNode, id: str, labels: dict[str, str]) -> None:
    request = api.UpdateContainer(id=id, labels=labels, fields=[f"labels.{name}" for name in labels])
    await node.client.call(api.CONTAINER_UPDATE, request, timeout=60, patience=30)


async def count(node: RuntimeNode, id: str) -> int:
    """How often a container has been started again, as its label says."""
    record = await node.client.call(api.CONTAINER_GET, api.GetContainer(id=id))
    return restart.count_of(record.labels)


async def wait_until(condition: Callable[[], bool | Awaitable[bool]], what: str, seconds: float = 30.0) -> None:
    """Returns when it is so."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if await found if inspect.isawaitable(found) else found:
            return
        assert time.monotonic() < deadline, f"not so after {seconds} s: {what}"
        await asyncio.sleep(0.02)
