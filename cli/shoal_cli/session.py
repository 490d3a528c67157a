"""A process in front of us: its streams are ours, signals and the terminal's size go to it, and its exit comes back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from shoal_bus import subjects
from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.consumer import read_events
from shoal_bus.errors import DeadlineExceeded, FailedPrecondition, NotFound, ShoalError, Unavailable

from shoal_cli import terminal
from shoal_cli.signals import ENDING, FORWARDED, LEAVING, forwarding, leaving_for
from shoal_cli.stdio import Streams
from shoal_cli.telling import tell

_CLOCKS_DIFFER = timedelta(minutes=5)
_EVENT_SECONDS = 30.0
_AGAIN_SECONDS = 0.5
_FIRST = asyncio.FIRST_COMPLETED


class Exited(NamedTuple):
    """The process has ended, and its output has come to the last byte."""

    status: int


class Left(NamedTuple):
    """We have left it, and it goes on: by the detach keys, or for a signal of our own, as if by one."""

    signal: int = 0

    @property
    def status(self) -> int:
        return 128 + self.signal if self.signal else 0


async def follow(
    client: Client,
    process: runtime.Task,
    streams: Streams,
    *,
    began: datetime,
    tty: bool,
    forward: bool = True,
    redraw: bool = False,
) -> Exited | Left:
    """Copies the process's streams until it ends, or we leave it.

    With `tty`, our terminal is raw meanwhile and its size is passed on; SIGTERM and SIGHUP then have us leave, so that
    it is restored. Without, signals are passed on, unless `forward` is false: SIGINT, too, has us leave then. `redraw`
    has a program that draws the whole screen do so.
    """
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[int] = loop.create_future()
    ended = asyncio.create_task(_exit_of_followed(client, process, streams, began))
    try:
        with ExitStack() as stack:
            ours = set(LEAVING if not forward else (signal.SIGTERM, signal.SIGHUP) if tty else ())
            stack.enter_context(leaving_for(ours, signalled))
            if forward:
                numbers = [number for number in FORWARDED if number not in ours]
                stack.enter_context(forwarding(client, process, numbers, signalled))
            if tty:
                stack.enter_context(terminal.raw())
                stack.enter_context(_resizing(client, process, redraw))
            streams.started(partial(_end_input, client, process))
            first: set[asyncio.Future[Any]] = {ended, streams.left, signalled}
            await asyncio.wait(first, return_when=_FIRST)
            if ended.done():
                return Exited(await _finish(streams, await ended))
            streams.leave()
    finally:
        ended.cancel()
    if signalled.done():
        return Left(signalled.result())
    return Left({"detached": 0, "hung up": signal.SIGHUP, "unwanted": signal.SIGPIPE}[streams.left.result()])


async def _finish(streams: Streams, status: int) -> int:
    """Copies what is still on its way, however long whoever reads it takes, and returns `status`.

    A signal gives that up: there is nobody left it could be for.
    """
    signalled: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    finishing = asyncio.create_task(streams.finish())
    either: set[asyncio.Future[Any]] = {finishing, signalled}
    with leaving_for(ENDING, signalled):
        await asyncio.wait(either, return_when=_FIRST)
    if not finishing.done():
        finishing.cancel()
        return 128 + signalled.result()
    await finishing
    return status


async def _exit_of_followed(client: Client, process: runtime.Task, streams: Streams, began: datetime) -> int:
    """How a process ends whose streams we have, which don't pass through the bus: without it we go on, until they end.

    UNAVAILABLE when they have, and nobody says how the process has.
    """
    while True:
        try:
            return await exit_of(client, process, began)
        except _Unknown:
            raise
        except Unavailable:
            if streams.ended:
                raise
            await asyncio.sleep(_AGAIN_SECONDS)


class _Unknown(Unavailable):
    """It is gone, and nobody will ever say how it ended."""


async def exit_of(client: Client, process: runtime.Task, began: datetime) -> int:
    """How a process ends, or has ended: asked of the runtime, and of the event stream where it is gone.

    A container with --rm may be removed before we ask, or be started again; its `/tasks/exit` event outlives it.
    """
    id, exec_id = process.container_id, process.exec_id
    try:
        request = runtime.WaitTask(container_id=id, exec_id=exec_id, pid=process.pid)
        return (await client.call(runtime.TASK_WAIT, request, timeout=None)).exit_status
    except NotFound:
        pattern = subjects.event_pattern(client.node, client.namespace, "runtime", "/tasks/exit", id)
        try:
            async with asyncio.timeout(_EVENT_SECONDS):
                async with aclosing(read_events(client.connection, [pattern], since=began - _CLOCKS_DIFFER)) as events:
                    async for received in events:
                        exited = runtime.TaskExited.of(received.event.payload)
                        if exited.pid == process.pid and exited.id == (exec_id or id):
                            return exited.exit_status
        except TimeoutError:
            pass
        raise _Unknown(f"container {id}: it is gone, and how it ended isn't known") from None


async def _end_input(client: Client, process: runtime.Task) -> None:
    """Our standard input is at its end: so is the process's. A supervisor keeps it open until it is told."""
    with suppress(NotFound, FailedPrecondition):  # it has exited
        request = runtime.ProcessRequest(container_id=process.container_id, exec_id=process.exec_id)
        await client.call(runtime.TASK_CLOSE_IO, request)


@contextmanager
def _resizing(client: Client, process: runtime.Task, redraw: bool) -> Iterator[None]:
    """Our terminal's size is the process's, now and whenever it changes."""
    changed = asyncio.Event()
    changed.set()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    task = asyncio.create_task(_resize(client, process, changed, redraw))
    try:
        yield
    finally:
        task.cancel()
        loop.remove_signal_handler(signal.SIGWINCH)


async def _resize(client: Client, process: runtime.Task, changed: asyncio.Event, redraw: bool) -> None:
    """Passes sizes on one after the other, so that the last one stays."""
    while True:
        await changed.wait()
        changed.clear()
        try:
            size = terminal.size()
            if size is None:
                continue
            # A program that has been told this very size before hears of it only when it changes.
            for rows in (size.height + 1, size.height) if redraw else (size.height,):
                request = runtime.ResizeTask(
                    container_id=process.container_id, exec_id=process.exec_id, width=size.width, height=rows
                )
                await client.call(runtime.TASK_RESIZE, request)
            redraw = False
        except (NotFound, FailedPrecondition):
            pass  # it has exited
        except (Unavailable, DeadlineExceeded):
            changed.set()  # it is told once somebody is there to be told
            await asyncio.sleep(_AGAIN_SECONDS)
        except ShoalError as error:
            tell(f"shoal: the terminal's size was not passed on: {error}\n")
