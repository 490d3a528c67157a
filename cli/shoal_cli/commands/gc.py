"""`gc`, and `lease create|ls|rm|add|drop|resources`: what nothing holds any more goes, and what holds."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer()
leases = typer.Typer(help="Leases: they hold images, blobs, snapshots and ingests that nothing else refers to.")

ID = typer.Argument(help="The lease's id.", show_default=False)
RESOURCES = typer.Argument(
    help="TYPE=ID: content=sha256:…, images=NAME, snapshots/overlayfs=KEY or ingests=REF.", show_default=False
)


@app.command()
@client_command
async def gc(
    target: Target,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only say how much was removed.")] = False,
) -> None:
    """Collect garbage now, on the whole node: blobs, snapshots, ingests, images, leases and mounts nothing holds."""
    from shoal_bus.api import content

    from shoal_cli.output import print_json, size

    async with target.client() as client:
        done = await client.call(content.NODE_GC, content.Collect(), timeout=None)
    if target.json:
        print_json(done)
        return
    if not quiet:
        for one in done.removed:
            print(f"{one.namespace} {one.type} {one.id}")
        if done.counts and len(done.removed) < sum(done.counts.values()):
            print("…")
    counted = [f"{count} {type}" for type, count in sorted(done.counts.items())]
    print(f"removed {', '.join(counted) or 'nothing'}, {size(done.bytes)}, in {done.seconds:.2f} s")


@leases.command()
@client_command
async def create(
    target: Target,
    id: Annotated[str, typer.Argument(help="Its id; else one is made up.", show_default=False)] = "",
    expire: Annotated[str, typer.Option(help="How long it lasts, as 90s, 10m or 24h; never is for ever.")] = "24h",
    flat: Annotated[bool, typer.Option("--flat", help="Hold what it names, and not what that leads to.")] = False,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE.")] = None,
) -> None:
    """Make a lease; prints its id."""
    from shoal_bus.api import content
    from shoal_bus.collection import EXPIRE, FLAT

    from shoal_cli.output import print_json
    from shoal_cli.request import expiry, labels

    given = labels(label or [])
    if expire != "never":
        given[EXPIRE] = expiry(expire)
    if flat:
        given[FLAT] = "true"
    async with target.client() as client:
        made = await client.call(content.LEASE_CREATE, content.CreateLease.of({"id": id, "labels": given}))
    if target.json:
        print_json(made)
    else:
        print(made.id)


@leases.command("ls")
@client_command
async def list_(
    target: Target,
    filter: Annotated[list[str] | None, typer.Option("--filter", "-f", help="As id==x or labels.key==value.")] = None,
) -> None:
    """List leases."""
    from shoal_bus.api import content
    from shoal_bus.collection import EXPIRE

    from shoal_cli.output import age, print_json, print_table

    async with target.client() as client:
        found = await client.collect(content.LEASE_LIST, content.ListLeases(filters=filter or []))
    if target.json:
        print_json(found)
        return
    rows = [
        (
            lease.id,
            age(lease.created_at),
            lease.labels.get(EXPIRE, "never"),
            " ".join(f"{key}={value}" for key, value in sorted(lease.labels.items()) if key != EXPIRE),
        )
        for lease in found
    ]
    print_table(("LEASE", "CREATED", "EXPIRES", "LABELS"), rows)


@leases.command()
@client_command
async def rm(
    target: Target,
    id: Annotated[list[str], ID],
    sync: Annotated[bool, typer.Option("--sync", help="Return when what only they held is gone.")] = False,
) -> int:
    """End leases: what nothing else holds is collected."""
    from shoal_bus.api import content

    from shoal_cli.each import for_each

    async with target.client() as client:
        return await for_each(
            id,
            lambda one: client.call(content.LEASE_DELETE, content.DeleteLease.of({"id": one, "sync": sync})),
            quiet=target.json,
        )


@leases.command()
@client_command
async def add(target: Target, id: Annotated[str, ID], resource: Annotated[list[str], RESOURCES]) -> int:
    """Have a lease hold resources; they needn't be there yet."""
    from shoal_bus.api import content

    from shoal_cli.each import for_each
    from shoal_cli.request import lease_resource

    async with target.client() as client:
        return await for_each(
            resource, lambda one: client.call(content.LEASE_ADD, lease_resource(id, one)), quiet=target.json
        )


@leases.command()
@client_command
async def drop(target: Target, id: Annotated[str, ID], resource: Annotated[list[str], RESOURCES]) -> int:
    """Take resources from a lease."""
    from shoal_bus.api import content

    from shoal_cli.each import for_each
    from shoal_cli.request import lease_resource

    async with target.client() as client:
        return await for_each(
            resource, lambda one: client.call(content.LEASE_REMOVE, lease_resource(id, one)), quiet=target.json
        )


@leases.command()
@client_command
async def resources(target: Target, id: Annotated[str, ID]) -> None:
    """List what a lease holds by name."""
    from shoal_bus.api import content

    from shoal_cli.output import print_json, print_table

    async with target.client() as client:
        found = await client.collect(content.LEASE_RESOURCES, content.LeaseRequest.of({"id": id}))
    if target.json:
        print_json(found)
    else:
        print_table(("TYPE", "ID"), [(one.type, one.id) for one in found])
