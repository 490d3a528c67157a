"""`shoal run`: a container from an image, in front of us or behind."""

from __future__ import annotations

import secrets
import signal

from shoal_bus.api import content, runtime
from shoal_bus.client import Client
from shoal_bus.errors import NotFound
from shoal_bus.message import now
from shoal_bus.restart import is_wanted_again

from shoal_cli import terminal
from shoal_cli.fifos import Fifos, Place
from shoal_cli.pull import pull
from shoal_cli.reference import normalise
from shoal_cli.session import Exited, follow
from shoal_cli.signals import interruptible
from shoal_cli.stdio import Streams
from shoal_cli.stopping import stop_task
from shoal_cli.telling import tell

_LEFT = ("amber", "brisk", "calm", "dapper", "eager", "fleet", "gentle", "keen", "lively", "mellow", "nimble", "quiet")
_RIGHT = ("anchovy", "bream", "cod", "dory", "eel", "goby", "herring", "ide", "ling", "perch", "sprat", "tuna")
_UNWANTED_GRACE_SECONDS = 2.0
"""Between TERM and KILL, when nobody reads what comes out: a process of ours would have been killed by SIGPIPE."""


def generated_name() -> str:
    """A name for a container that was given none, as `brisk-herring-3f9a`."""
    return f"{secrets.choice(_LEFT)}-{secrets.choice(_RIGHT)}-{secrets.token_hex(2)}"


async def ensure_image(client: Client, name: str, *, plain_http: bool, platform: str, lease: str = "") -> str:
    """The image's full name; pulled first, and said so, where it isn't there. A `lease` holds it."""
    full = normalise(name)
    try:
        image = await client.call(content.IMAGE_GET, content.ImageRequest(name=full))
    except NotFound:
        tell(f"{full}: not here yet, pulling it\n")
        request = content.PullImage(name=full, platform=platform, plain_http=plain_http)
        return (await pull(client.with_lease(lease), request)).name
    if lease:
        held = {"lease": lease, "type": "content", "id": image.target.digest}  # which leads to all of it
        await client.call(content.LEASE_ADD, content.ChangeLease.of(held))
    return full


async def run_detached(client: Client, request: runtime.RunTask, fifos: Fifos, *, interactive: bool, tty: bool) -> None:
    """Starts the container and prints its id. Its streams are at /dev/null, or wait for who attaches to it."""
    if interactive or tty:
        await fifos.sweep(client)
        with fifos.make(request.id, stdin=interactive or tty, terminal=tty) as place:
            await client.operate(runtime.TASK_RUN, _with_streams(request, place))
            place.kept = True
    else:
        await client.operate(runtime.TASK_RUN, request)
    print(request.id)


async def run_attached(
    client: Client, request: runtime.RunTask, fifos: Fifos, *, interactive: bool, tty: bool, keys: bytes
) -> int:
    """Runs the container with our streams as its own; returns its exit status, or what leaving it is told with.

    With `tty` our terminal is raw while it runs and its size is passed on; without, signals are.
    """
    if tty:
        terminal.needed()
    began = now()
    await fifos.sweep(client)
    with fifos.make(request.id, stdin=interactive or tty, terminal=tty) as place:
        request = _with_streams(request, place)
        with Streams(request.stdio, keys=keys if tty else b"") as streams:
            task = await interruptible(client.operate(runtime.TASK_RUN, request))
            place.kept = True  # whatever becomes of us, it goes on, and may be attached to
            # What it has written meanwhile waits in the pipes: until here, all that comes is from a run that may fail.
            ending = await follow(client, task, streams, began=began, tty=tty)
            status = its_own = ending.status
            if not isinstance(ending, Exited):
                if tty or ending.signal != signal.SIGPIPE:
                    left_behind(f"container {request.id}", f"shoal attach {request.id}", tty=tty)
                    return status
                exit = await stop_task(client, request.id, _UNWANTED_GRACE_SECONDS)
                its_own = exit.exit_status if exit is not None else status
        container = None if request.remove else await _found(client, request.id)
        place.kept = container is not None
        if container is not None and is_wanted_again(container.labels, its_own):
            tell(
                f"shoal: container {request.id} is started again by its restart policy; end it with"
                f" `shoal stop {request.id}`\n"
            )
    return status


def left_behind(what: str, command: str, *, tty: bool = False) -> None:
    """Says how to come back to what goes on without us; on its `tty` it has left the cursor anywhere."""
    tell(("\n" if tty else "") + f"shoal: {what} goes on; come back with `{command}`\n")


def _with_streams(request: runtime.RunTask, place: Place) -> runtime.RunTask:
    """The request with these streams, and with a terminal of our terminal's kind unless it says otherwise."""
    change: dict[str, object] = {"stdio": place.stdio}
    if place.stdio.terminal and request.spec is None:
        change["env"] = [f"TERM={terminal.kind()}", *request.env]
        change["console_size"] = terminal.size()
    return request.model_copy(update=change)


async def _found(client: Client, id: str) -> runtime.Container | None:
    try:
        return await client.call(runtime.CONTAINER_GET, runtime.GetContainer(id=id))
    except NotFound:
        return None
