"""What every service's process does around its service: flags, logging, connection, signals, drain.

def main() -> None:
    run_service("content", setup)

async def setup(process: Process) -> None:
    process.database("metadata.db", MIGRATIONS)
    service = process.service()
    service.handle(…)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from shoal_bus import limits, logs
from shoal_bus.connection import Connection, connect
from shoal_bus.database import Database
from shoal_bus.errors import FailedPrecondition, PermissionDenied, ShoalError
from shoal_bus.harness import Service
from shoal_bus.locks import Locks
from shoal_bus.node import Node, find
from shoal_bus.relay import Relay

log = structlog.get_logger(__name__)

START_PATIENCE_SECONDS = 30.0


class Process:
    """One running copy of a service, while it is being set up. Whatever `stack` holds is undone when it stops."""

    def __init__(
        self,
        name: str,
        node: Node,
        connection: Connection,
        stack: AsyncExitStack,
        args: argparse.Namespace,
        stop: asyncio.Event,
    ) -> None:
        self.name, self.node, self.connection, self.stack, self.args = name, node, connection, stack, args
        self.stop = stop
        """Set when it has been told to stop: what a setup waits for may be in vain."""
        self.root, self.state = node.root_of(name), node.state_of(name)
        self._database: Database | None = None
        self._service: Service | None = None
        self._locks: Locks | None = None

    @property
    def locks(self) -> Locks:
        """Locks that all copies of this service on this node share, and that die with their holder."""
        if self._locks is None:
            self._locks = Locks(self.state / "locks")
            self.stack.callback(self._locks.close)
        return self._locks

    def database(self, migrations: Sequence[str]) -> Database:
        """This service's database, `<root>/<service>/metadata.db`."""
        if self._database is None:
            self._database = Database(self.root / "metadata.db", self.node.name, migrations, service=self.name)
            self.stack.callback(self._database.close)
        return self._database

    def service(self, description: str = "") -> Service:
        """The service to register handlers on; made once. Call `database` first where it keeps state."""
        if self._service is None:
            locks = self.locks if self._database is not None else None
            self._service = Service(
                self.name, self.connection, node=self.node.name, description=description,
                database=self._database, locks=locks,
            )  # fmt: skip
            if self._database is not None and locks is not None:
                relay = Relay(self._service, self._database, locks, domain=self.node.domain)
                self._service.background(relay.run(), "relay")
        return self._service


def run_service(
    name: str,
    setup: Callable[[Process], Awaitable[None]],
    *,
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
    needs_root: bool = True,
) -> None:
    """A service's `main`: runs until SIGTERM or SIGINT, drains, and exits 0; a start that fails is one line and 1."""
    parser = argparse.ArgumentParser(prog=f"shoal-{name}", description=f"shoal's {name} service")
    parser.add_argument("--node", default="", help="this node's name (default: SHOAL_NODE, or the host's name)")
    parser.add_argument("--root", type=Path, help="what outlives a reboot (default: SHOAL_ROOT, or /var/lib/shoal)")
    parser.add_argument("--state", type=Path, help="what doesn't (default: SHOAL_STATE, or /run/shoal)")
    parser.add_argument(
        "--nats-url", default="", help="the bus (default: SHOAL_NATS_URL, or the one `shoal up` left in --state)"
    )
    parser.add_argument("--runtime", default="", help="the default OCI runtime")
    parser.add_argument(
        "--log-level", default=os.environ.get("SHOAL_LOG_LEVEL", "info"), help="debug, info, warning or error"
    )
    if arguments is not None:
        arguments(parser)
    args = parser.parse_args(argv)
    logs.configure(name, args.log_level)
    try:
        if needs_root and os.geteuid() != 0:
            raise PermissionDenied(f"shoal-{name} must run as root")
        limits.raise_open_files()
        node = find(nats_url=args.nats_url, state=args.state, name=args.node, root=args.root, runtime=args.runtime)
        _loop_run(_serve(name, node, setup, args))
    except ShoalError as error:
        sys.stderr.write(f"shoal-{name}: {error} [{error.code.name}]\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _loop_run(main: Awaitable[None]) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)  # type: ignore[arg-type]


async def _serve(name: str, node: Node, setup: Callable[[Process], Awaitable[None]], args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        connection = await connect(node.address, name=f"shoal-{name}@{node.name}", patience=START_PATIENCE_SECONDS)
        stack.push_async_callback(connection.close)
        process = Process(name, node, connection, stack, args, stop)
        await setup(process)
        if process._service is None:
            raise FailedPrecondition(f"shoal-{name}: no service was set up")
        await process._service.start()
        await stop.wait()
        log.info("service.draining")
        await process._service.drain()
    log.info("service.stopped")
