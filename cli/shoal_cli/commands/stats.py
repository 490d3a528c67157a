"""`stats`, `top`: what containers use, and what runs in them."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer()


@app.command()
@client_command
async def stats(
    target: Target,
    container: Annotated[
        list[str] | None, typer.Argument(help="The containers' ids; else all that run.", show_default=False)
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Go on until interrupted, or print once; else a terminal has it live, and a pipe once.",
            show_default=False,
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show what containers use: CPU (100 % is one of them), memory without idle page cache, block I/O, processes."""
    from shoal_cli.stats import show

    async with target.client() as client:
        await show(client, container or [], interval=interval, stream=stream, as_json=target.json)


@app.command()
@client_command
async def top(
    target: Target, container: Annotated[str, typer.Argument(help="The container's id.", show_default=False)]
) -> None:
    """List the processes of a container; on its own node with what they are, elsewhere with their pids."""
    from shoal_bus.api import runtime

    from shoal_cli.output import print_json, print_table
    from shoal_cli.top import cpu_time, describe, is_here

    async with target.client() as client:
        request = runtime.TaskRequest.of({"container_id": container})
        found = (await client.call(runtime.TASK_PIDS, request)).processes
    if not is_here(target):
        if target.json:
            print_json(found)
        else:
            print_table(("PID", "EXEC"), [(str(one.pid), one.exec_id) for one in found])
        return
    described = [(one, about) for one in found if (about := describe(one.pid)) is not None]
    if target.json:
        print_json([{**one.model_dump(), **about} for one, about in described])
        return
    rows = [
        (str(one.pid), about["user"], cpu_time(about["cpu_seconds"]), one.exec_id, about["command"])
        for one, about in described
    ]
    print_table(("PID", "USER", "TIME", "EXEC", "COMMAND"), rows)
