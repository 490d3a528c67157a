"""`containerd`: the node behind containerd's flags, its configuration file's commands, and its help for OCI hooks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal_cli.containerd import configuration as files
from shoal_cli.containerd.printing import dump as printed

app = typer.Typer()
config_app = typer.Typer()
app.add_typer(config_app, name="config", help="What a containerd configuration file comes to here.")

_ADDRESS = typer.Option("--address", "-a", help="The gRPC server's socket.", show_default=False)
_FILE, _HOOK = "shoal.config", "oci-hook"
_CONFIG = typer.Option("--config", "-c", help="A configuration file of containerd's, version 2 or later.")


@app.callback(invoke_without_command=True)
def containerd(
    context: typer.Context,
    address: Annotated[Path | None, _ADDRESS] = None,
    root: Annotated[Path | None, typer.Option(help="What outlives a reboot.", show_default=False)] = None,
    state: Annotated[Path | None, typer.Option(help="What doesn't.", show_default=False)] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", "-l", help="trace, debug, info, warn, error, fatal or panic.")
    ] = None,
    config: Annotated[Path, _CONFIG] = files.DEFAULT_FILE,
    version: Annotated[bool, typer.Option("--version", "-v", help="Show the version.")] = False,
) -> None:
    """Run a whole node behind containerd's flags and configuration file: its gRPC API is on the socket ADDRESS.

    A flag wins over the file. What the file says that doesn't apply to a node of shoal's is a warning.
    """
    if version:
        from shoal_cli import __version__

        print(f"containerd shoal v{__version__}")
        return
    if context.invoked_subcommand == _HOOK:
        return  # whatever the file says, a container may start
    asked_for = config != files.DEFAULT_FILE
    if log_level is not None and log_level not in files.LEVELS:
        raise typer.BadParameter(f"--log-level {log_level!r}: must be one of {', '.join(files.LEVELS)}")
    context.meta[_FILE] = config
    context.obj = files.overridden(
        files.load(config, asked_for=asked_for),
        address=address.absolute() if address else None, root=root, state=state,
        level=files.LEVELS[log_level] if log_level else None,
    )  # fmt: skip
    if context.invoked_subcommand is None:
        from shoal_cli.containerd.node import run

        run(context.obj)


@config_app.command()
def default() -> None:
    """Print the configuration of a node that is told nothing."""
    print(printed(files.Configuration()), end="")


@config_app.command()
def dump(context: typer.Context) -> None:
    """Print the configuration that the file and the flags before `config` come to."""
    from shoal_cli.telling import tell

    found: files.Configuration = context.obj
    for warning in found.warnings:
        tell(f"shoal: {warning}\n")
    print(printed(found), end="")


@config_app.command()
def migrate(context: typer.Context) -> None:
    """Print the file in the newest version of its format, without what it imports; what doesn't apply here is left out.

    What `config default` prints stays as it is.
    """
    from shoal_cli.telling import tell

    path: Path = context.meta[_FILE]
    found = files.load(path, asked_for=path != files.DEFAULT_FILE, alone=True)
    for warning in found.warnings:
        tell(f"shoal: {warning}\n")
    print(printed(found), end="")


@app.command(_HOOK, context_settings={"ignore_unknown_options": True})
def oci_hook(
    command: Annotated[list[str], typer.Argument(help='The hook, with {{id}}, {{pid}}, {{annotation "key"}} in it.')],
) -> None:
    """Run COMMAND as a hook of an OCI runtime, with what the container's state (on standard input) says filled in."""
    from shoal_cli.containerd import hooks

    hooks.run(command, sys.stdin.read(), os.environ)
