"""Stopping containers: TERM, a while, KILL. Of one for `shoal stop`, of a node for `shoal up --stop-containers`."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress

from shoal_bus.api import content, runtime
from shoal_bus.client import Client
from shoal_bus.errors import DeadlineExceeded, FailedPrecondition, NotFound
from shoal_bus.node import Node

GRACE_SECONDS = 10.0
KILL_SECONDS = 10.0
_HOLD_SECONDS = 300.0
"""How long nothing is started again by its restart policy, unless the node is up again before that."""


async def stop_containers(node: Node) -> int:
    """Stops all tasks of all namespaces; returns how many there were. Restart policies wait for the next start."""
    async with Client.open(node.address, node.name, name="shoal-up") as client:
        await client.call(runtime.NODE_HOLD_RESTARTS, runtime.HoldRestarts(seconds=_HOLD_SECONDS))
        namespaces = {
            namespace.name async for namespace in client.stream(content.NAMESPACE_LIST, content.ListNamespaces())
        }
        stopped = 0
        for namespace in sorted(namespaces | {"default"}):
            scoped = client.with_namespace(namespace)
            for _ in range(2):  # a restart that was under way already may have come in between
                tasks = await scoped.collect(runtime.TASK_LIST, runtime.ListTasks())
                await asyncio.gather(*(stop_task(scoped, task.container_id) for task in tasks))
                await asyncio.gather(*(_delete(scoped, task.container_id) for task in tasks))
                stopped += len(tasks)
        return stopped


async def release_restarts(node: Node) -> None:
    """The node is up: what stopping its containers had restart policies wait for has come."""
    async with Client.open(node.address, node.name, name="shoal-up") as client:
        await client.call(runtime.NODE_HOLD_RESTARTS, runtime.HoldRestarts(seconds=0))


async def stop_task(client: Client, id: str, grace: float = GRACE_SECONDS) -> runtime.Exit | None:
    """TERM, at most `grace` seconds, KILL: how it ended, or None where it was gone (and removed) already."""
    request = runtime.WaitTask(container_id=id)
    waiting = asyncio.create_task(client.call(runtime.TASK_WAIT, request, timeout=None))
    try:
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, KILL_SECONDS)):
            with suppress(NotFound, FailedPrecondition):  # it has just exited: the wait knows how
                await client.call(runtime.TASK_KILL, runtime.KillTask(container_id=id, signal=number))
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if done:
                break
        else:
            raise DeadlineExceeded(f"container {id}: it survived SIGKILL", hint="look at its process with ps")
        return await waiting
    except NotFound:
        return None
    finally:
        waiting.cancel()


async def _delete(client: Client, id: str) -> None:
    with suppress(NotFound):  # run with --rm: it removed itself
        await client.call(runtime.TASK_DELETE, runtime.DeleteTask(container_id=id))
