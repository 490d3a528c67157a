"""The command line, put together, and run: whatever goes wrong becomes one line and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import typer
from shoal_bus.errors import ShoalError

from shoal_cli import telling
from shoal_cli.commands import (
    containerd,
    containers,
    content,
    events,
    gc,
    image,
    images,
    mounts,
    network,
    node,
    registry,
    snapshot,
    stats,
    tasks,
)
from shoal_cli.errors import EXPLAINED, INTERRUPTED, exit_code, report

app = typer.Typer(
    name="shoal",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Containers on Linux, over NATS: images, snapshots, execution and networks, each a service on the bus.",
    epilog=EXPLAINED,
)
for family in (node, images, registry, gc, containers, tasks, stats, events):
    app.add_typer(family.app)
app.add_typer(containerd.app, name="containerd")
app.add_typer(image.app, name="image")
app.add_typer(network.app, name="network")
app.add_typer(content.app, name="content")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(mounts.app, name="mounts")
app.add_typer(gc.leases, name="lease")

# typer exports only some of the classes whose base this is: every mistake in how a command was called.
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]


@functools.cache
def command() -> Any:
    """All commands, ready to parse."""
    return typer.main.get_command(app)


def run(arguments: list[str]) -> int:
    """Runs one command line to its exit code."""
    try:
        code = command()(arguments, prog_name="shoal", standalone_mode=False)
        sys.stdout.flush()
    except ShoalError as error:
        report(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Who reads our output has had enough: not an error, and nothing more to be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _USAGE_ERROR as error:
        context = error.ctx.command_path if error.ctx is not None else "shoal"
        telling.tell(f"shoal: {' '.join(error.format_message().split())} (see `{context} --help`)\n")
        return int(error.exit_code)
    return code if isinstance(code, int) else 0
