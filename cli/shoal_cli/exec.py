"""`shoal exec`: a further process in a container, in front of us or behind."""

from __future__ import annotations

import secrets

from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ShoalError
from shoal_bus.message import now

from shoal_cli import terminal
from shoal_cli.fifos import Fifos
from shoal_cli.run import left_behind
from shoal_cli.session import Exited, follow
from shoal_cli.signals import interruptible
from shoal_cli.stdio import Streams
from shoal_cli.telling import tell

_NOTHING_THERE = (NotFound, FailedPrecondition, InvalidArgument, AlreadyExists)
_REMOVAL_SECONDS = 10.0


def generated_id() -> str:
    """The id of an exec that nobody names."""
    return f"x-{secrets.token_hex(6)}"


async def exec_detached(client: Client, request: runtime.ExecTask) -> None:
    """Starts the process with its streams at /dev/null and prints its id; it is forgotten when it ends."""
    await client.call(runtime.TASK_EXEC, request.model_copy(update={"remove": True}))
    print(request.exec_id)


async def exec_attached(
    client: Client, request: runtime.ExecTask, fifos: Fifos, *, interactive: bool, tty: bool, keys: bytes
) -> int:
    """Runs the process with our streams as its own; returns its exit status.

    It ends with us, however we end, unless it is left by the detach keys.
    """
    if tty:
        terminal.needed()
        change = {"env": [f"TERM={terminal.kind()}", *request.env], "console_size": terminal.size()}
        request = request.model_copy(update=change)
    began = now()
    id, exec_id = request.container_id, request.exec_id
    await fifos.sweep(client)
    with fifos.make(id, exec_id, stdin=interactive or tty, terminal=tty) as place:
        request = request.model_copy(update={"stdio": place.stdio})
        with Streams(place.stdio, keys=keys if tty else b"") as streams:
            ours = True
            try:
                task = await interruptible(client.call(runtime.TASK_EXEC, request))
                ending = await follow(client, task, streams, began=began, tty=tty)
                ours = isinstance(ending, Exited) or ending.signal != 0
            except _NOTHING_THERE:
                ours = False
                raise
            finally:
                if ours:
                    await _remove(client, id, exec_id)
        place.kept = not ours
    if not ours:
        left_behind(f"exec {exec_id}", f"shoal attach --exec {exec_id} {id}", tty=tty)
    return ending.status


async def _remove(client: Client, id: str, exec_id: str) -> None:
    """Removes the exec, whatever it does."""
    try:
        request = runtime.DeleteTask(container_id=id, exec_id=exec_id, force=True)
        await client.call(runtime.TASK_DELETE, request, timeout=_REMOVAL_SECONDS)
    except NotFound:
        pass  # it went with its container
    except ShoalError as error:
        tell(f"shoal: exec {exec_id} was not removed: {error}\n")
