"""`shoal run`: a container from an image, in front of us or behind."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial

from shoal_bus import subjects
from shoal_bus.api import content, runtime
from shoal_bus.client import Client
from shoal_bus.consumer import read_events
from shoal_bus.errors import FailedPrecondition, NotFound, ShoalError, Unavailable
from shoal_bus.message import now

from shoal_cli import terminal
from shoal_cli.pull import pull
from shoal_cli.reference import normalise
from shoal_cli.stdio import Streams, needs_terminal
from shoal_cli.stopping import stop_task

FORWARDED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
_LEFT = ("amber", "brisk", "calm", "dapper", "eager", "fleet", "gentle", "keen", "lively", "mellow", "nimble", "quiet")
_RIGHT = ("anchovy", "bream", "cod", "dory", "eel", "goby", "herring", "ide", "ling", "perch", "sprat", "tuna")
_CLOCKS_DIFFER = timedelta(minutes=5)
_EVENT_SECONDS = 30.0
_UNWANTED_GRACE_SECONDS = 2.0
"""Between TERM and KILL, when nobody reads what comes out: a process of ours would have been killed by SIGPIPE."""
_FIRST = asyncio.FIRST_COMPLETED


def generated_name() -> str:
    """A name for a container that was given none, as `brisk-herring-3f9a`."""
    return f"{secrets.choice(_LEFT)}-{secrets.choice(_RIGHT)}-{secrets.token_hex(2)}"


async def ensure_image(client: Client, name: str, *, plain_http: bool, platform: str) -> str:
    """The image's full name; pulled first, and said so, where it isn't there."""
    full = normalise(name)
    try:
        await client.call(content.IMAGE_GET, content.ImageRequest(name=full))
    except NotFound:
        sys.stderr.write(f"{full}: not here yet, pulling it\n")
        request = content.PullImage(name=full, platform=platform, plain_http=plain_http)
        return (await pull(client, request)).name
    return full


async def run_detached(client: Client, request: runtime.RunTask) -> None:
    """Starts the container with its streams at /dev/null and prints its id."""
    await client.operate(runtime.TASK_RUN, request)
    print(request.id)


async def run_attached(client: Client, request: runtime.RunTask, *, interactive: bool, tty: bool) -> int:
    """Runs the container with our streams as its own; returns its exit status.

    With `tty` our terminal is raw while it runs and its size is passed on; without, signals are.
    """
    if tty:
        needs_terminal()
    began = now()
    with ExitStack() as stack:
        streams = stack.enter_context(Streams(stdin=interactive or tty, terminal=tty))
        request = request.model_copy(update={"stdio": streams.stdio})
        starting = asyncio.ensure_future(client.operate(runtime.TASK_RUN, request))
        try:
            with _interrupts(starting):
                task = await starting
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        ended = asyncio.create_task(exit_of(client, request.id, task.pid, began))
        unwanted = asyncio.create_task(streams.unwanted.wait())
        try:
            stack.enter_context(_passing_on(client, request.id, tty=tty))
            if tty:
                stack.enter_context(terminal.raw())
            # What it has written meanwhile waits in the pipes: until here, all that comes is from a run that may fail.
            streams.started(partial(_end_input, client, request.id))
            await asyncio.wait({ended, unwanted}, return_when=_FIRST)
            if not ended.done():
                await stop_task(client, request.id, _UNWANTED_GRACE_SECONDS)
            status = await ended
            await streams.finish()
            return status
        finally:
            ended.cancel()
            unwanted.cancel()


async def exit_of(client: Client, id: str, pid: int, began: datetime) -> int:
    """How the container `id` ends, or has ended: asked of the runtime, and of the event stream where it is gone.

    A container with --rm may be removed before we ask; its `/tasks/exit` event outlives it.
    """
    try:
        return (await client.call(runtime.TASK_WAIT, runtime.ProcessRequest(container_id=id), timeout=None)).exit_status
    except NotFound:
        pattern = subjects.event_pattern(client.node, client.namespace, "runtime", "/tasks/exit", id)
        try:
            async with asyncio.timeout(_EVENT_SECONDS):
                async with aclosing(read_events(client.connection, [pattern], since=began - _CLOCKS_DIFFER)) as events:
                    async for received in events:
                        exited = runtime.TaskExited.of(received.event.payload)
                        if exited.pid == pid and exited.id in ("", id):
                            return exited.exit_status
        except TimeoutError:
            pass
        raise Unavailable(f"container {id}: it is gone, and how it ended isn't known") from None


@contextmanager
def _interrupts(starting: asyncio.Future[runtime.Task]) -> Iterator[None]:
    """Until the container runs, a signal gives up the run, which undoes it."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, starting.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextmanager
def _passing_on(client: Client, id: str, *, tty: bool) -> Iterator[None]:
    """Signals to us go to the container; with a terminal, also its size, now and whenever it changes."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def spawn(number: signal.Signals) -> None:
        work = _resize(client, id) if number == signal.SIGWINCH else _kill(client, id, number)
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    numbers = [*FORWARDED, signal.SIGWINCH] if tty else [*FORWARDED]
    for number in numbers:
        loop.add_signal_handler(number, spawn, number)
    if tty:
        spawn(signal.SIGWINCH)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        for task in tasks:
            task.cancel()


async def _kill(client: Client, id: str, number: signal.Signals) -> None:
    try:
        await client.call(runtime.TASK_KILL, runtime.KillTask(container_id=id, signal=number))
    except (NotFound, FailedPrecondition):
        pass  # it has exited: the one who waits says so
    except ShoalError as error:
        sys.stderr.write(f"shoal: {number.name} was not passed on: {error}\r\n")


async def _end_input(client: Client, id: str) -> None:
    """Our standard input is at its end: so is the container's. A supervisor keeps it open until it is told."""
    with suppress(NotFound, FailedPrecondition):  # it has exited
        await client.call(runtime.TASK_CLOSE_IO, runtime.ProcessRequest(container_id=id))


async def _resize(client: Client, id: str) -> None:
    try:
        width, height = terminal.window()
        await client.call(runtime.TASK_RESIZE, runtime.ResizeTask(container_id=id, width=width, height=height))
    except (NotFound, FailedPrecondition):
        pass  # it has exited
    except (ShoalError, OSError) as error:
        sys.stderr.write(f"shoal: the terminal's size was not passed on: {error}\r\n")
