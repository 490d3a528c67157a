"""A process in front of us: its streams are ours, signals and the terminal's size go to it, and its exit comes back."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple, TypeVar

from shoal_bus import subjects
from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.consumer import read_events
from shoal_bus.errors import FailedPrecondition, NotFound, ShoalError, Unavailable

from shoal_cli import terminal
from shoal_cli.restart import is_ending, stopping
from shoal_cli.stdio import Streams

T = TypeVar("T")

FORWARDED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLOCKS_DIFFER = timedelta(minutes=5)
_EVENT_SECONDS = 30.0
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
    ended = asyncio.create_task(exit_of(client, process, began))
    try:
        with ExitStack() as stack:
            ours = set(_OURS if not forward else (signal.SIGTERM, signal.SIGHUP) if tty else ())
            stack.enter_context(_leaving_for(ours, signalled))
            if forward:
                stack.enter_context(_forwarding(client, process, [n for n in FORWARDED if n not in ours]))
            if tty:
                stack.enter_context(terminal.raw())
                stack.enter_context(_resizing(client, process, redraw))
            streams.started(partial(_end_input, client, process))
            await asyncio.wait({ended, streams.left, signalled}, return_when=_FIRST)  # type: ignore[type-var]
            if ended.done():
                status = await ended
                await streams.finish()
                return Exited(status)
    finally:
        ended.cancel()
    if signalled.done():
        return Left(signalled.result())
    return Left({"detached": 0, "hung up": signal.SIGHUP, "unwanted": signal.SIGPIPE}[streams.left.result()])


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
        raise Unavailable(f"container {id}: it is gone, and how it ended isn't known") from None


async def interruptible(work: Awaitable[T]) -> T:
    """Does `work`; a signal gives it up."""
    future = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in _OURS:
        loop.add_signal_handler(number, future.cancel)
    try:
        return await future
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number in _OURS:
            loop.remove_signal_handler(number)


@contextmanager
def _leaving_for(numbers: set[signal.Signals], signalled: asyncio.Future[int]) -> Iterator[None]:
    def leave(number: int) -> None:
        if not signalled.done():
            signalled.set_result(number)

    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, leave, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _forwarding(client: Client, process: runtime.Task, numbers: list[signal.Signals]) -> Iterator[None]:
    """Signals to us go to the process."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def spawn(number: signal.Signals) -> None:
        task = asyncio.create_task(_kill(client, process, number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in numbers:
        loop.add_signal_handler(number, spawn, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        for task in tasks:
            task.cancel()


async def _kill(client: Client, process: runtime.Task, number: signal.Signals) -> None:
    try:
        if is_ending(number) and not process.exec_id:
            await stopping(client, process.container_id)
        request = runtime.KillTask(container_id=process.container_id, exec_id=process.exec_id, signal=number)
        await client.call(runtime.TASK_KILL, request)
    except (NotFound, FailedPrecondition):
        pass  # it has exited: the one who waits says so
    except ShoalError as error:
        sys.stderr.write(f"shoal: {number.name} was not passed on: {error}\r\n")


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
            width, height = terminal.window()
            # A program that has been told this very size before hears of it only when it changes.
            for rows in (height + 1, height) if redraw else (height,):
                request = runtime.ResizeTask(
                    container_id=process.container_id, exec_id=process.exec_id, width=width, height=rows
                )
                await client.call(runtime.TASK_RESIZE, request)
            redraw = False
        except (NotFound, FailedPrecondition):
            pass  # it has exited
        except (ShoalError, OSError) as error:
            sys.stderr.write(f"shoal: the terminal's size was not passed on: {error}\r\n")
