"""`shoal attach`: our streams as those of a process that runs already."""

from __future__ import annotations

import signal

from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.errors import FailedPrecondition
from shoal_bus.message import now

from shoal_cli import terminal
from shoal_cli.fifos import attached
from shoal_cli.run import left_behind
from shoal_cli.session import Exited, follow
from shoal_cli.stdio import Streams


async def attach(client: Client, request: runtime.ProcessRequest, *, stdin: bool, forward: bool, keys: bytes) -> int:
    """Attaches to a process until it ends or we leave it; returns its exit status, or what leaving it is told with.

    FAILED_PRECONDITION when it has ended, has no streams to attach to, or somebody else is attached: what comes out
    can't be read twice.
    """
    began = now()
    process = await client.call(runtime.TASK_GET, request)
    id, exec_id = process.container_id, process.exec_id
    what = f"container {id}, exec {exec_id}" if exec_id else f"container {id}"
    if process.status not in ("created", "running", "paused"):
        raise FailedPrecondition(f"{what}: is {process.status}, there is nothing to attach to")
    with attached(process.stdio, what):
        tty = process.stdio.terminal and stdin
        if tty:
            terminal.needed("give --no-stdin to look on only")
        with Streams(process.stdio, stdin=stdin, keys=keys if tty else b"") as streams:
            ending = await follow(client, process, streams, began=began, tty=tty, forward=forward, redraw=True)
    if not isinstance(ending, Exited) and ending.signal != signal.SIGPIPE:
        command = f"shoal attach --exec {exec_id} {id}" if exec_id else f"shoal attach {id}"
        left_behind(what, command, tty=tty)
    return ending.status
