"""Signals to us: passed on to the process in front of us, or a reason to leave it."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Awaitable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.errors import FailedPrecondition, NotFound, ShoalError

from shoal_cli.restart import is_ending, stopping
from shoal_cli.telling import tell

T = TypeVar("T")

LEAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDING = (*LEAVING, signal.SIGQUIT)
"""What is to end whoever it is sent to."""
FORWARDED = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)

_PASSING_ON_SECONDS = 5.0
"""How long a signal waits for a service that isn't there."""
_INSISTENT, _INSISTENT_SECONDS = 3, 2.0


async def interruptible(work: Awaitable[T]) -> T:
    """Does `work`; a signal gives it up."""
    future = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in LEAVING:
        loop.add_signal_handler(number, future.cancel)
    try:
        return await future
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number in LEAVING:
            loop.remove_signal_handler(number)


@contextmanager
def leaving_for(numbers: Collection[signal.Signals], signalled: asyncio.Future[int]) -> Iterator[None]:
    """The first of these signals becomes the result of `signalled`."""
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, _leave, signalled, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _leave(signalled: asyncio.Future[int], number: int) -> None:
    if not signalled.done():
        signalled.set_result(number)


@contextmanager
def forwarding(
    client: Client, process: runtime.Task, numbers: Collection[signal.Signals], signalled: asyncio.Future[int]
) -> Iterator[None]:
    """These signals go to the process.

    One that is to end it and can't be passed on is the result of `signalled`: we would be deaf to it else. So is one
    that comes three times in two seconds, since a process may ignore what whoever sends it means to be heard.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    recent: deque[float] = deque(maxlen=_INSISTENT)

    def forward(number: signal.Signals) -> None:
        if number in ENDING:
            recent.append(loop.time())
            if len(recent) == _INSISTENT and recent[-1] - recent[0] < _INSISTENT_SECONDS:
                _leave(signalled, number)
                return
        task = asyncio.create_task(_kill(client, process, number, signalled))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in numbers:
        loop.add_signal_handler(number, forward, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        for task in tasks:
            task.cancel()


async def _kill(client: Client, process: runtime.Task, number: signal.Signals, signalled: asyncio.Future[int]) -> None:
    try:
        if is_ending(number) and not process.exec_id:
            await stopping(client, process.container_id, patience=_PASSING_ON_SECONDS)
        request = runtime.KillTask(container_id=process.container_id, exec_id=process.exec_id, signal=number)
        await client.call(runtime.TASK_KILL, request, patience=_PASSING_ON_SECONDS)
    except (NotFound, FailedPrecondition):
        pass  # it has exited: the one who waits says so
    except ShoalError as error:
        tell(f"shoal: {number.name} was not passed on: {error}\n")
        if number in ENDING:
            _leave(signalled, number)
