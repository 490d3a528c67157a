"""`shoal up`: a whole node, from the first process to the last.

Start: the bus, then the services, each asked after until it is ready. Stop: whoever has clients first, the bus last, so
that every answer and every event still finds its way. Containers belong to their shims and run on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from shoal_bus.errors import PermissionDenied, ShoalError
from shoal_bus.node import DEFAULT_ROOT, DEFAULT_STATE, NODE_FILE, Node, default_name, parse_url
from shoal_bus.subjects import check_node

from shoal_cli import forks
from shoal_cli.commandserver import server as commandserver
from shoal_cli.image_mounts import forget_gone
from shoal_cli.stopping import release_restarts, stop_containers
from shoal_cli.up.bus import READY, EmbeddedBus
from shoal_cli.up.child import Child, Running, started
from shoal_cli.up.forked import SHARED, Forked
from shoal_cli.up.lines import Lines
from shoal_cli.up.lock import only_one

BUS = "bus"
STOP_ORDER = (("gateway",), ("runtime", "content"), ("network", "snapshot"))
"""Who is asked to stop together: nobody before those who call it."""
SERVICES = tuple(name for group in reversed(STOP_ORDER) for name in group)
START_SECONDS = 60.0
_OF_A_WHOLE_NODE = {"gateway": ("--await", str(START_SECONDS / 2))}
"""What a service is told that isn't alone."""
_SERVICE_READY = "service.ready"


@dataclass(frozen=True)
class UpOptions:
    """What `shoal up` is told."""

    node: str = ""
    root: Path = DEFAULT_ROOT
    state: Path = DEFAULT_STATE
    runtime: str = "runc"
    nats_url: str = ""
    stop_containers: bool = False
    log_level: str = "info"
    arguments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further arguments, by service."""
    warnings: Sequence[str] = ()
    """What to say before the first process starts."""


def up(options: UpOptions) -> None:
    """Runs the node until SIGINT or SIGTERM."""
    if os.geteuid() != 0:
        raise PermissionDenied("shoal up must run as root", hint="try sudo")
    root, state = options.root.absolute(), options.state.absolute()
    name = check_node(options.node) if options.node else default_name()
    forks.load(*SHARED)
    forks.name("shoal-up", " ".join(("shoal", *sys.argv[1:])))
    with only_one(state):
        asyncio.run(_NodeUp(options, name, root, state).run())


class _NodeUp:
    def __init__(self, options: UpOptions, name: str, root: Path, state: Path) -> None:
        self._options = options
        self._lines = Lines(options.log_level)
        bus = None if options.nats_url else EmbeddedBus(name, root, state)
        address = bus.address if bus is not None else parse_url(options.nats_url)
        self.node = Node(name=name, root=root, state=state, address=address, runtime=options.runtime or "runc")
        self._bus = (
            None if bus is None else self._child(BUS, partial(started, bus.command, _environment(bus.environment)))
        )
        self._services = {service: self._child(service, partial(self._begin, service)) for service in SERVICES}
        self._stop = asyncio.Event()
        self._signals = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        for warning in self._options.warnings:
            self._lines.say("configuration.ignored", "warning", what=warning)
        async with AsyncExitStack() as stack:
            stack.callback((self.node.state / NODE_FILE).unlink, missing_ok=True)
            self.node.save()
            if self._bus is not None:
                stack.push_async_callback(self._bus.stop)
                self._bus.start()
                if not await self._unless_stopped(self._bus.ready(START_SECONDS)):
                    return
            stack.push_async_callback(self._stop_services)
            for child in self._services.values():
                child.start()
            stack.enter_context(commandserver.serving(self.node.state))
            for child in self._services.values():
                if not await self._unless_stopped(child.ready(START_SECONDS)):
                    return
            self._lines.say(
                "node.up", node=self.node.name, root=str(self.node.root), state=str(self.node.state),
                bus=", ".join(self.node.address.urls), pids={name: c.pid for name, c in self._services.items()},
            )  # fmt: skip
            await self._release_restarts()
            await self._forget_image_mounts()
            await self._stop.wait()
            if self._options.stop_containers:
                await self._stop_containers()
        self._lines.say("node.down", node=self.node.name)

    async def _unless_stopped(self, ready: Coroutine[Any, Any, None]) -> bool:
        """Waits for a child to be ready; False when we were told to stop before it was."""
        work = asyncio.create_task(ready)
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            return not self._stop.is_set()
        finally:
            stop.cancel()
            work.cancel()

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        if self._signals == 1:
            self._lines.say("node.stopping", signal=signal.Signals(number).name)
            self._stop.set()
            return
        self._lines.say("node.killing", "warning", signal=signal.Signals(number).name)
        for child in self._services.values():
            child.kill()

    async def _release_restarts(self) -> None:
        try:
            await self._unless_stopped(release_restarts(self.node))
        except ShoalError as error:  # they come a while later
            self._lines.say("restarts.not_released", "warning", error=str(error))

    async def _forget_image_mounts(self) -> None:
        try:
            await self._unless_stopped(forget_gone(self.node))
        except ShoalError as error:  # the next command about them does it
            self._lines.say("image_mounts.kept", "warning", error=str(error))

    async def _stop_containers(self) -> None:
        try:
            count = await stop_containers(self.node)
        except ShoalError as error:
            self._lines.say("containers.not_stopped", "error", error=str(error))
        else:
            self._lines.say("containers.stopped", count=count)

    async def _stop_services(self) -> None:
        for group in STOP_ORDER:
            await asyncio.gather(*(self._services[name].stop() for name in group))

    def _begin(self, service: str) -> Running:
        options = self._options
        # They say all they have to say; what is shown is our choice, and "ready" must reach us.
        level = "debug" if options.log_level == "debug" else "info"
        arguments = [
            "--node", self.node.name, "--root", str(self.node.root), "--state", str(self.node.state),
            "--runtime", self.node.runtime, "--log-level", level, *_OF_A_WHOLE_NODE.get(service, ()),
            *options.arguments.get(service, ()),
        ]  # fmt: skip
        package = f"shoal_{service}"
        if not forks.is_current():
            return started(lambda: [sys.executable, "-I", "-m", package, *arguments], _environment())
        return Forked(package, arguments, _environment())

    def _child(self, name: str, begin: Callable[[], Running]) -> Child:
        return Child(name, begin, self._heard, self._restarts)

    def _heard(self, name: str, line: bytes) -> bool:
        heard = self._lines.take(name, line)
        return READY in heard.event if name == BUS else heard == (name, _SERVICE_READY)

    def _restarts(self, name: str, how: str, pause: float) -> None:
        self._lines.say("process.restarts", "warning", process=name, how=how, in_seconds=pause)


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours for our children, who are told all that is theirs."""
    left_out = ("SHOAL_NATS_URL", "SHOAL_NODE", "SHOAL_ROOT", "SHOAL_STATE")
    return {key: value for key, value in os.environ.items() if key not in left_out} | dict(more or {})
