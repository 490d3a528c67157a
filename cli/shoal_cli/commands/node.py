"""`up`, `nodes`, `version`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer()

LOG_LEVELS = ("debug", "info", "warning", "error")


@app.command()
def up(
    node: Annotated[
        str, typer.Option(envvar="SHOAL_NODE", help="This node's name; else the host's.", show_default=False)
    ] = "",
    root: Annotated[Path, typer.Option(envvar="SHOAL_ROOT", help="What outlives a reboot.")] = Path("/var/lib/shoal"),
    state: Annotated[Path, typer.Option(envvar="SHOAL_STATE", help="What doesn't.")] = Path("/run/shoal"),
    runtime: Annotated[str, typer.Option(help="The OCI runtime of containers that don't name one.")] = "runc",
    nats_url: Annotated[
        str,
        typer.Option(
            envvar="SHOAL_NATS_URL", help="A bus of your own, instead of one on loopback.", show_default=False
        ),
    ] = "",
    registry_config: Annotated[
        Path | None,
        typer.Option(help="The directory of the hosts.toml files.", show_default="/etc/shoal/certs.d"),
    ] = None,
    stop_containers: Annotated[
        bool, typer.Option("--stop-containers", help="At the end, stop all containers, which else run on.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run a whole node in the foreground: the bus and all services. Ctrl-C stops it; containers run on."""
    from shoal_cli.up.node import UpOptions
    from shoal_cli.up.node import up as run_up

    level = "warning" if quiet else _level(log_level)
    arguments = {"content": ("--registry-config", str(registry_config.absolute()))} if registry_config else {}
    run_up(UpOptions(node, root, state, runtime, nats_url, stop_containers, level, arguments))


def _level(given: str) -> str:
    if given not in LOG_LEVELS:
        raise typer.BadParameter(f"--log-level {given!r}: must be one of {', '.join(LOG_LEVELS)}")
    return given


@app.command()
@client_command
async def nodes(target: Target) -> None:
    """List the nodes on the bus, and the copies of each service that answer there."""
    from shoal_cli.nodes import collect
    from shoal_cli.output import print_json, print_table

    async with target.client() as client:
        found = await collect(client.connection)
    if target.json:
        print_json(
            [
                {
                    "node": s.node,
                    "service": s.service,
                    "copies": len(s.ids),
                    "versions": sorted(s.versions),
                    "ids": sorted(s.ids),
                }
                for s in found
            ]
        )
        return
    rows = [(s.node, s.service, str(len(s.ids)), ", ".join(sorted(s.versions))) for s in found]
    print_table(("NODE", "SERVICE", "COPIES", "VERSION"), rows)


@app.command()
def completion(shell: Annotated[str, typer.Argument(help="bash or zsh.")]) -> None:
    """Print a shell's completion script, as `source <(shoal completion bash)` wants it."""
    from typer._completion_shared import get_completion_script

    if shell not in ("bash", "zsh"):
        raise typer.BadParameter(f"{shell!r}: must be bash or zsh")
    print(get_completion_script(prog_name="shoal", complete_var="_SHOAL_COMPLETE", shell=shell))


@app.command()
def version(json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False) -> None:
    """Show this command's version."""
    from shoal_cli import __version__

    print(f'{{"version": "{__version__}"}}' if json else f"shoal {__version__}")
