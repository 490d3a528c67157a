"""`network create|ls|inspect|attach|detach|rm`: network namespaces that last, with or without containers."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer(help="Network namespaces that last, and what is attached to them.")

ID = typer.Argument(help="The network's id.", show_default=False)


@app.command()
@client_command
async def create(
    target: Target,
    id: Annotated[str, ID],
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE.")] = None,
) -> None:
    """Make a network namespace with loopback up; prints its path."""
    from shoal_bus.api import network

    from shoal_cli.output import print_json
    from shoal_cli.request import labels

    async with target.client() as client:
        made = await client.call(
            network.NETWORK_CREATE, network.CreateNetwork.of({"id": id, "labels": labels(label or [])})
        )
    if target.json:
        print_json(made)
    else:
        print(made.path)


@app.command("ls")
@client_command
async def list_(target: Target) -> None:
    """List network namespaces."""
    from shoal_bus.api import network

    from shoal_cli.output import age, print_json, print_table

    async with target.client() as client:
        found = await client.collect(network.NETWORK_LIST, network.ListNetworks())
    if target.json:
        print_json(found)
        return
    rows = [
        (
            n.id,
            " ".join(f"{a.interface}@{a.bridge}={','.join(a.addresses)}" for a in n.attachments),
            n.path,
            age(n.created_at),
        )
        for n in sorted(found, key=lambda n: n.id)
    ]
    print_table(("NETWORK", "ATTACHED", "PATH", "CREATED"), rows)


@app.command()
@client_command
async def inspect(target: Target, id: Annotated[str, ID]) -> None:
    """Show everything about a network namespace, as JSON."""
    from shoal_bus.api import network

    from shoal_cli.output import print_json

    async with target.client() as client:
        print_json(await client.call(network.NETWORK_GET, network.NetworkRequest.of({"id": id})))


@app.command()
@client_command
async def attach(
    target: Target,
    id: Annotated[str, ID],
    ip: Annotated[list[str] | None, typer.Option(help="An address, as 10.88.0.2/24; may be repeated.")] = None,
    gateway: Annotated[str, typer.Option(help="Where the default route goes.", show_default=False)] = "",
    route: Annotated[list[str] | None, typer.Option(help="DESTINATION[=GATEWAY]; may be repeated.")] = None,
    interface: Annotated[str, typer.Option(help="Its name inside.")] = "eth0",
    bridge: Annotated[str, typer.Option(help="The bridge; made where it isn't there.")] = "shoal0",
    bridge_ip: Annotated[str, typer.Option(help="An address for the bridge itself.", show_default=False)] = "",
    mac: Annotated[str, typer.Option(help="Its hardware address.", show_default=False)] = "",
    mtu: Annotated[int, typer.Option(help="Its MTU; 0 leaves the kernel's default.", min=0, max=65535)] = 0,
) -> None:
    """Attach a network namespace to a bridge by a veth pair."""
    from shoal_bus.api import network

    from shoal_cli.output import print_json

    routes = [{"destination": d, "gateway": g} for d, _, g in (entry.partition("=") for entry in route or [])]
    request = network.AttachLink.of(
        {
            "id": id, "interface": interface, "bridge": bridge, "bridge_address": bridge_ip or None,
            "addresses": ip or [], "gateway": gateway, "routes": routes, "mac": mac, "mtu": mtu,
        }
    )  # fmt: skip
    async with target.client() as client:
        attached = await client.call(network.LINK_ATTACH, request)
    if target.json:
        print_json(attached)
    else:
        print(f"{attached.interface} {attached.mac} {' '.join(attached.addresses)}".rstrip())


@app.command()
@client_command
async def detach(
    target: Target,
    id: Annotated[str, ID],
    interface: Annotated[str, typer.Option(help="Its name inside.")] = "eth0",
) -> None:
    """Take an interface away again."""
    from shoal_bus.api import network

    async with target.client() as client:
        await client.call(network.LINK_DETACH, network.DetachLink.of({"id": id, "interface": interface}))


@app.command()
@client_command
async def rm(target: Target, id: Annotated[list[str], ID]) -> int:
    """Remove network namespaces, with everything attached to them."""
    from shoal_bus.api import network

    from shoal_cli.each import for_each

    async with target.client() as client:
        return await for_each(
            id,
            lambda one: client.call(network.NETWORK_DELETE, network.NetworkRequest.of({"id": one})),
            quiet=target.json,
        )
