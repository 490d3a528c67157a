"""`events`: what happens, as it happens, or from a time on."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer()


@app.command()
@client_command
async def events(
    target: Target,
    since: Annotated[
        str, typer.Option(help="Begin there: a time (RFC 3339), or how long ago, as 10m.", show_default=False)
    ] = "",
    filter: Annotated[
        list[str] | None,
        typer.Option("--filter", "-f", help="topic=/tasks/exit, id=web-1, service=runtime; several of one key: any."),
    ] = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of every namespace.")] = False,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="Of every node on the bus.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Wait for more, or end with what is there.")
    ] = True,
) -> None:
    """Show events as they happen; with --json, one to a line."""
    from shoal_cli.events import Wanted, print_events

    wanted = Wanted.parse(filter or [], target.namespace, all_namespaces=all_namespaces, all_nodes=all_nodes)
    async with target.client() as client:
        await print_events(client, wanted, since=since, follow=follow, as_json=target.json)
