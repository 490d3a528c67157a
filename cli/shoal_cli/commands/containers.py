"""`run`, `ps`, `kill`, `stop`, `start`, `rm`, `inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shoal_cli.commands.images import PLAIN_HTTP, PLATFORM
from shoal_cli.commands.tasks import DETACH_KEYS
from shoal_cli.target import Target, client_command

if TYPE_CHECKING:
    from shoal_bus.api import runtime

app = typer.Typer()

CONTAINERS = typer.Argument(help="The containers' ids.", show_default=False)


@app.command(context_settings={"allow_interspersed_args": False})
@client_command
async def run(
    target: Target,
    image: Annotated[str, typer.Argument(help="The image; pulled first where it isn't there.")],
    args: Annotated[list[str] | None, typer.Argument(help="What to run, instead of the image's command.")] = None,
    name: Annotated[str, typer.Option(help="The container's id; else one is made up.", show_default=False)] = "",
    rm: Annotated[bool, typer.Option("--rm", help="Remove it when it exits, with all that was made for it.")] = False,
    restart: Annotated[
        str, typer.Option(help="When to start it again: no, always, unless-stopped or on-failure[:N].")
    ] = "no",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it in the background; print its id.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Pass on standard input.")] = False,
    detach_keys: Annotated[str, DETACH_KEYS] = "ctrl-p,ctrl-q",
    env: Annotated[list[str] | None, typer.Option("--env", "-e", help="KEY=VALUE, or KEY for its value here.")] = None,
    net: Annotated[str, typer.Option(help="none, host or bridge.")] = "none",
    ip: Annotated[str, typer.Option(help="For bridge: its address, as 10.88.0.2/24.", show_default=False)] = "",
    gateway: Annotated[str, typer.Option(help="For bridge: where its default route goes.", show_default=False)] = "",
    bridge: Annotated[str, typer.Option(help="For bridge: which one; made where it isn't there.")] = "shoal0",
    workdir: Annotated[
        str, typer.Option("--workdir", "--cwd", "-w", help="Working directory.", show_default=False)
    ] = "",
    user: Annotated[str, typer.Option("--user", "-u", help="USER[:GROUP], names or ids.", show_default=False)] = "",
    hostname: Annotated[str, typer.Option(help="Its host name; else its id.", show_default=False)] = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="Mount its root read-only.")] = False,
    memory: Annotated[str, typer.Option(help="Its limit of memory, as 512m.", show_default=False)] = "",
    cpus: Annotated[float | None, typer.Option(help="How many CPUs' time, as 1.5.")] = None,
    pids_limit: Annotated[int, typer.Option(help="How many processes; 0 or -1 for no limit.")] = 0,
    runtime: Annotated[str, typer.Option(help="OCI runtime; else the node's default.", show_default=False)] = "",
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE.")] = None,
    platform: Annotated[str, PLATFORM] = "",
    plain_http: Annotated[bool, PLAIN_HTTP] = False,
    lease: Annotated[
        str, typer.Option("--lease", help="A lease: it holds the image, until it ends.", show_default=False)
    ] = "",
) -> int:
    """Run a container; exits with its status, or with 125 when shoal failed.

    Everything after the image is the container's: options for run go before it. Signals are passed on; one that comes
    three times in two seconds leaves the container to itself, and `shoal attach` comes back to it.
    """
    from shoal_bus.errors import ShoalError

    from shoal_cli import run as running
    from shoal_cli.detach import parse_keys
    from shoal_cli.errors import report, start_exit_code
    from shoal_cli.fifos import Fifos
    from shoal_cli.request import environment, labels, network, restart_policy
    from shoal_cli.resources import run_limits

    try:
        keys = parse_keys(detach_keys)
        wanted = {
            "id": name or running.generated_name(), "args": args or [], "env": environment(env or []), "cwd": workdir,
            "user": user, "hostname": hostname, "labels": labels(label or []), "runtime": runtime,
            "network": network(net, ip, gateway, bridge), "read_only": read_only, "remove": rm,
            "restart": restart_policy(restart, remove=rm),
            "resources": run_limits(memory=memory, cpus=cpus, pids_limit=pids_limit),
        }  # fmt: skip
        from shoal_bus.api.runtime import RunTask

        RunTask.of({"image": image, **wanted})  # before anything is pulled for it
        async with target.client() as client:
            full = await running.ensure_image(client, image, plain_http=plain_http, platform=platform, lease=lease)
            request = RunTask.of({"image": full, **wanted})
            fifos = Fifos(target.find().state, target.namespace)
            if detach:
                await running.run_detached(client, request, fifos, interactive=interactive, tty=tty)
                return 0
            return await running.run_attached(client, request, fifos, interactive=interactive, tty=tty, keys=keys)
    except ShoalError as error:
        report(error)
        return start_exit_code(error)


@app.command()
@client_command
async def ps(
    target: Target, all: Annotated[bool, typer.Option("--all", "-a", help="Also those that don't run.")] = False
) -> None:
    """List containers."""
    from shoal_bus.api import runtime

    from shoal_cli.output import age, plain, print_json, print_table
    from shoal_cli.restart import is_restarting

    async with target.client() as client:
        containers = await client.collect(runtime.CONTAINER_LIST, runtime.ListContainers(specs=False))
        tasks = {t.container_id: t for t in await client.collect(runtime.TASK_LIST, runtime.ListTasks())}
    found = [(c, tasks.get(c.id)) for c in sorted(containers, key=lambda c: c.created_at)]
    shown = [(c, t) for c, t in found if all or (t is not None and t.status != "stopped") or is_restarting(c, t)]
    if target.json:
        print_json([{**plain(c), "task": plain(t)} for c, t in shown])
        return
    rows = [(c.id, c.image, _status(c, t), str(t.pid) if t and t.pid else "", age(c.created_at)) for c, t in shown]
    print_table(("CONTAINER", "IMAGE", "STATUS", "PID", "CREATED"), rows)


def _status(container: runtime.Container, task: runtime.Task | None) -> str:
    from shoal_cli.restart import is_restarting

    if task is None:
        return "no task"
    if task.status != "stopped":
        return task.status
    return f"{'restarting' if is_restarting(container, task) else 'exited'} ({task.exit_status})"


@app.command()
@client_command
async def kill(
    target: Target,
    container: Annotated[list[str], CONTAINERS],
    signal: Annotated[str, typer.Option("--signal", "-s", help="By name or number.")] = "KILL",
) -> int:
    """Send a signal to containers.

    One that is to end it (KILL, TERM, INT, QUIT) tells a restart policy `unless-stopped` that it was stopped.
    """
    from shoal_bus.api import runtime

    from shoal_cli.each import for_each
    from shoal_cli.request import signal_number
    from shoal_cli.restart import is_ending, stopping

    number = signal_number(signal)
    async with target.client() as client:

        async def kill_one(id: str) -> None:
            if is_ending(number):
                await stopping(client, id)
            await client.call(runtime.TASK_KILL, runtime.KillTask.of({"container_id": id, "signal": number}))

        return await for_each(container, kill_one, quiet=target.json)


@app.command()
@client_command
async def stop(
    target: Target,
    container: Annotated[list[str], CONTAINERS],
    time: Annotated[float, typer.Option("--time", "-t", min=0, help="Seconds between TERM and KILL.")] = 10.0,
) -> int:
    """Stop containers: TERM, a while, KILL. They stay stopped, whatever their restart policy."""
    from shoal_bus.api.runtime import TASK_GET, ProcessRequest
    from shoal_bus.errors import NotFound

    from shoal_cli.each import for_each
    from shoal_cli.restart import shown, stopped, stopping
    from shoal_cli.stopping import stop_task

    async with target.client() as client:

        async def stop_one(id: str) -> None:
            record = await stopping(client, id)
            try:
                await client.call(TASK_GET, ProcessRequest.of({"container_id": id}))
            except NotFound:
                if shown(record) is None:
                    raise
            else:
                await stop_task(client, id, time)
            await stopped(client, record)

        return await for_each(container, stop_one, quiet=target.json)


@app.command()
@client_command
async def start(target: Target, container: Annotated[list[str], CONTAINERS]) -> int:
    """Start containers that have ended, in the background; their restart policies hold again."""
    from shoal_bus.api.runtime import CONTAINER_START, ContainerRequest

    from shoal_cli.each import for_each

    async with target.client() as client:
        return await for_each(
            container,
            lambda id: client.call(CONTAINER_START, ContainerRequest.of({"id": id}), timeout=60.0),
            quiet=target.json,
        )


@app.command()
@client_command
async def rm(
    target: Target,
    container: Annotated[list[str], CONTAINERS],
    force: Annotated[bool, typer.Option("--force", "-f", help="Kill what still runs.")] = False,
) -> int:
    """Remove containers, with everything that was made for them."""
    from shoal_bus.api.runtime import CONTAINER_REMOVE, RemoveContainer

    from shoal_cli.each import for_each
    from shoal_cli.fifos import Fifos

    async with target.client() as client:
        fifos = Fifos(target.find().state, target.namespace)

        async def remove_one(id: str) -> None:
            await client.call(CONTAINER_REMOVE, RemoveContainer.of({"id": id, "force": force}), timeout=60.0)
            fifos.remove(id)

        return await for_each(container, remove_one, quiet=target.json)


@app.command()
@client_command
async def inspect(
    target: Target, name: Annotated[str, typer.Argument(help="A container's id, or an image's name.")]
) -> None:
    """Show everything about a container (with its task) or an image, as JSON."""
    from shoal_bus.api import content, runtime
    from shoal_bus.errors import InvalidArgument, NotFound

    from shoal_cli.output import plain, print_json
    from shoal_cli.reference import normalise
    from shoal_cli.restart import shown

    async with target.client() as client:
        try:
            container = await client.call(runtime.CONTAINER_GET, runtime.GetContainer.of({"id": name}))
        except (NotFound, InvalidArgument):  # an image's name isn't an id
            pass
        else:
            try:
                task = await client.call(runtime.TASK_GET, runtime.ProcessRequest(container_id=name))
            except NotFound:
                task = None
            print_json({**plain(container), "restart": shown(container), "task": plain(task)})
            return
        try:
            image = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=normalise(name)))
        except NotFound:
            raise NotFound(
                f"{name}: neither a container nor an image", hint="see `shoal ps -a`, `shoal images`"
            ) from None
        print_json(image)
