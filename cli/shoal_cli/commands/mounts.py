"""`mounts ls|info|rm`: what the node has mounted for tasks and clients."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer(help="Mounts that the node has made for root file systems which need more than mount(2).")

NAME = typer.Argument(help="The activation's name: a task's is its container's id.", show_default=False)
FILTER = typer.Option("--filter", help="containerd's, as name==web or labels.app==…; any of several matches.")


@app.command("ls")
@client_command
async def list_(target: Target, filter: Annotated[list[str] | None, FILTER] = None) -> None:
    """List activations."""
    from shoal_bus.api import runtime

    from shoal_cli.output import age, print_json, print_table

    async with target.client() as client:
        found = await client.collect(runtime.MOUNT_LIST, runtime.ListMounts(filters=filter or []))
    if target.json:
        print_json(found)
        return
    rows = [(one.name, " ".join(a.mount.type for a in one.active), one.lease, age(one.created_at)) for one in found]
    print_table(("NAME", "ACTIVE", "LEASE", "CREATED"), rows)


@app.command()
@client_command
async def info(target: Target, name: Annotated[str, NAME]) -> None:
    """Show what is mounted where, and what is left to be mounted, as JSON."""
    from shoal_bus.api import runtime

    from shoal_cli.output import print_json

    async with target.client() as client:
        print_json(await client.call(runtime.MOUNT_INFO, runtime.MountRequest.of({"name": name})))


@app.command()
@client_command
async def rm(target: Target, name: Annotated[list[str], NAME]) -> int:
    """Take away what is mounted; what still uses it does so until it is done."""
    from shoal_bus.api import runtime

    from shoal_cli.each import for_each

    async with target.client() as client:
        return await for_each(
            name,
            lambda one: client.call(runtime.MOUNT_DEACTIVATE, runtime.MountRequest.of({"name": one})),
            quiet=target.json,
        )
