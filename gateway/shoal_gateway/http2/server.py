"""Every connection to one Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from shoal_gateway.http2.connection import Connection, Method

_BACKLOG = 1024
_END_SECONDS = 1.0


class Server:
    """The connections, while there are any."""

    def __init__(self, connections: set[Connection]) -> None:
        self._connections = connections

    async def stop(self, seconds: float) -> None:
        """Takes no further calls; those under way may take so long, and are cancelled then."""
        for connection in self._connections:
            connection.leave()
        if tasks := self._tasks():
            await asyncio.wait(tasks, timeout=seconds)
        rest = self._tasks()
        for connection in list(self._connections):
            connection.close()
        if rest:
            await asyncio.wait(rest, timeout=_END_SECONDS)

    def _tasks(self) -> set[asyncio.Task[None]]:
        return {task for connection in self._connections for task in connection.tasks}


@asynccontextmanager
async def listening(path: str, methods: Mapping[str, Method]) -> AsyncIterator[Server]:
    """Serves `methods` on a new Unix socket at `path` for a block. OSError where it can't be bound."""
    connections: set[Connection] = set()
    listener = await asyncio.get_running_loop().create_unix_server(
        lambda: Connection(methods, connections), path, backlog=_BACKLOG
    )
    try:
        yield Server(connections)
    finally:
        listener.close()
