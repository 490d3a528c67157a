"""`exec`, `attach`, `pause`, `resume`, `update`, `checkpoint`: what is done to a container that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer()

CONTAINER = typer.Argument(help="The container's id.", show_default=False)
CONTAINERS = typer.Argument(help="The containers' ids.", show_default=False)
DETACH_KEYS = typer.Option(help="What leaves its terminal and lets it run on; empty for nothing.")


@app.command(context_settings={"allow_interspersed_args": False})
@client_command
async def exec(
    target: Target,
    container: Annotated[str, CONTAINER],
    command: Annotated[list[str], typer.Argument(help="What to run there, with its arguments.", show_default=False)],
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Pass on standard input.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it in the background; print its id.")] = False,
    user: Annotated[str, typer.Option("--user", "-u", help="USER[:GROUP], names or ids.", show_default=False)] = "",
    cwd: Annotated[str, typer.Option("--workdir", "--cwd", "-w", help="Working directory.", show_default=False)] = "",
    env: Annotated[list[str] | None, typer.Option("--env", "-e", help="KEY=VALUE, or KEY for its value here.")] = None,
    cap_add: Annotated[
        list[str] | None, typer.Option("--cap-add", help="A capability more, as NET_ADMIN; or ALL.")
    ] = None,
    detach_keys: Annotated[str, DETACH_KEYS] = "ctrl-p,ctrl-q",
) -> int:
    """Run a further process in a container; exits with its status, or with 125 when shoal failed.

    Everything after the container's id is the command's: options for exec go before it.
    """
    from shoal_bus.api.runtime import ExecTask
    from shoal_bus.errors import InvalidArgument, ShoalError

    from shoal_cli import exec as execution
    from shoal_cli.detach import parse_keys
    from shoal_cli.errors import report, start_exit_code
    from shoal_cli.fifos import Fifos
    from shoal_cli.request import environment

    try:
        if detach and (tty or interactive):
            raise InvalidArgument("-d runs in the background: it goes neither with -t nor with -i")
        keys = parse_keys(detach_keys)
        request = ExecTask.of({
            "container_id": container, "exec_id": execution.generated_id(), "args": command, "start": True,
            "env": environment(env or []), "cwd": cwd, "user": user, "capabilities": cap_add or [],
        })  # fmt: skip
        async with target.client() as client:
            if detach:
                await execution.exec_detached(client, request)
                return 0
            fifos = Fifos(target.find().state, target.namespace)
            return await execution.exec_attached(client, request, fifos, interactive=interactive, tty=tty, keys=keys)
    except ShoalError as error:
        report(error)
        return start_exit_code(error)


@app.command()
@client_command
async def attach(
    target: Target,
    container: Annotated[str, CONTAINER],
    exec_id: Annotated[str, typer.Option("--exec", help="One of its execs instead.", show_default=False)] = "",
    no_stdin: Annotated[bool, typer.Option("--no-stdin", help="Leave its standard input alone.")] = False,
    sig_proxy: Annotated[
        bool, typer.Option(help="Without a terminal, pass signals on; else they end the attachment alone.")
    ] = True,
    detach_keys: Annotated[str, DETACH_KEYS] = "ctrl-p,ctrl-q",
) -> int:
    """Attach to a running container's streams; exits with its status.

    One that was started with -i or -t has streams to attach to, and one client at a time is attached. What it writes
    meanwhile waits for who comes next, a pipe's worth. The end of standard input, unless that is its terminal, is the
    container's too.
    """
    from shoal_bus.api.runtime import ProcessRequest

    from shoal_cli import attach as attaching
    from shoal_cli.detach import parse_keys

    keys = parse_keys(detach_keys)
    request = ProcessRequest.of({"container_id": container, "exec_id": exec_id})
    async with target.client() as client:
        return await attaching.attach(client, request, stdin=not no_stdin, forward=sig_proxy, keys=keys)


@app.command()
@client_command
async def pause(target: Target, container: Annotated[list[str], CONTAINERS]) -> int:
    """Freeze every process of containers."""
    from shoal_bus.api import runtime

    from shoal_cli.each import for_each

    async with target.client() as client:
        return await for_each(
            container,
            lambda id: client.call(runtime.TASK_PAUSE, runtime.TaskRequest.of({"container_id": id})),
            quiet=target.json,
        )


@app.command()
@client_command
async def resume(target: Target, container: Annotated[list[str], CONTAINERS]) -> int:
    """Thaw paused containers."""
    from shoal_bus.api import runtime

    from shoal_cli.each import for_each

    async with target.client() as client:
        return await for_each(
            container,
            lambda id: client.call(runtime.TASK_RESUME, runtime.TaskRequest.of({"container_id": id})),
            quiet=target.json,
        )


@app.command()
@client_command
async def update(
    target: Target,
    container: Annotated[list[str], CONTAINERS],
    memory: Annotated[str, typer.Option(help="As 512m; -1 for no limit.", show_default=False)] = "",
    memory_swap: Annotated[
        str, typer.Option(help="Memory and swap together; -1 for no limit.", show_default=False)
    ] = "",
    cpus: Annotated[float | None, typer.Option(help="How many CPUs' time, as 1.5.")] = None,
    cpu_shares: Annotated[int | None, typer.Option(help="Its weight against others', 2 to 262144.")] = None,
    cpuset_cpus: Annotated[str, typer.Option(help="Which CPUs, as 0-2,4.", show_default=False)] = "",
    cpuset_mems: Annotated[str, typer.Option(help="Which memory nodes, as 0.", show_default=False)] = "",
    pids_limit: Annotated[int | None, typer.Option(help="How many processes; -1 for no limit.")] = None,
    blkio_weight: Annotated[int | None, typer.Option(help="Its weight at block devices, 10 to 1000.")] = None,
) -> int:
    """Change the limits of containers that run; what isn't given stays."""
    from shoal_bus.api import runtime

    from shoal_cli.each import for_each
    from shoal_cli.resources import new_limits

    limits = new_limits(
        memory=memory, memory_swap=memory_swap, cpus=cpus, cpu_shares=cpu_shares, cpuset_cpus=cpuset_cpus,
        cpuset_mems=cpuset_mems, pids_limit=pids_limit, blkio_weight=blkio_weight,
    )  # fmt: skip
    async with target.client() as client:
        return await for_each(
            container,
            lambda id: client.call(
                runtime.TASK_UPDATE, runtime.UpdateTask.of({"container_id": id, "resources": limits})
            ),
            quiet=target.json,
        )


@app.command()
@client_command
async def checkpoint(
    target: Target,
    container: Annotated[str, CONTAINER],
    path: Annotated[Path, typer.Argument(help="The directory to write it to, on the node.", show_default=False)],
    exit: Annotated[bool, typer.Option("--exit", help="End the container then.")] = False,
    tcp: Annotated[bool, typer.Option("--tcp", help="With its open TCP connections.")] = False,
) -> None:
    """Write a running container's state to a directory, with CRIU."""
    from shoal_bus.api import runtime

    request = runtime.CheckpointTask.of(
        {"container_id": container, "path": str(path.absolute()), "exit": exit, "open_tcp": tcp}
    )
    async with target.client() as client:
        await client.call(runtime.TASK_CHECKPOINT, request, timeout=None)
        if not target.json:
            print(path.absolute())
