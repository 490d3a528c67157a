"""`containerd`: the node behind containerd's flags, and its configuration file's two commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal_cli.containerd import configuration as files

app = typer.Typer()
config_app = typer.Typer()
app.add_typer(config_app, name="config", help="What a containerd configuration file comes to here.")

_ADDRESS = typer.Option("--address", "-a", help="The gRPC server's socket.", show_default=False)
_CONFIG = typer.Option("--config", "-c", help="A configuration file of containerd's, version 2 or 3.")


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
    asked_for = config != files.DEFAULT_FILE
    if log_level is not None and log_level not in files.LEVELS:
        raise typer.BadParameter(f"--log-level {log_level!r}: must be one of {', '.join(files.LEVELS)}")
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
    print(files.dump(files.Configuration()), end="")


@config_app.command()
def dump(context: typer.Context) -> None:
    """Print the configuration that the file and the flags before `config` come to."""
    from shoal_cli.telling import tell

    found: files.Configuration = context.obj
    for warning in found.warnings:
        tell(f"shoal: {warning}\n")
    print(files.dump(found), end="")
