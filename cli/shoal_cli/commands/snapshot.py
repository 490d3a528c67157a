"""`snapshot ls|tree|usage|info|diff|rm`: the layers that containers lie on, and their own."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer(help="Snapshots: images' layers as they are unpacked, and what containers write.")

KEY = typer.Argument(help="The snapshot's key.", show_default=False)
SNAPSHOTTER = typer.Option("--snapshotter", help="Whose snapshots.")
FILTER = typer.Option("--filter", help="containerd's, as kind==active or parent==…; any of several matches.")


@app.command("ls")
@client_command
async def list_(
    target: Target,
    filter: Annotated[list[str] | None, FILTER] = None,
    snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs",
) -> None:
    """List snapshots."""
    from shoal_bus.api import snapshot

    from shoal_cli.output import age, print_json, print_table

    async with target.client() as client:
        request = snapshot.ListSnapshots(filters=filter or [])
        found = await client.collect(snapshot.SNAPSHOT_LIST.on(snapshotter), request)
    if target.json:
        print_json(found)
        return
    rows = [(s.key, s.parent, s.kind, age(s.created_at)) for s in found]
    print_table(("KEY", "PARENT", "KIND", "CREATED"), rows)


@app.command()
@client_command
async def tree(target: Target, snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs") -> None:
    """Show which snapshot lies on which."""
    from shoal_bus.api import snapshot

    from shoal_cli.output import print_json
    from shoal_cli.trees import branches

    async with target.client() as client:
        found = await client.collect(snapshot.SNAPSHOT_LIST.on(snapshotter), snapshot.ListSnapshots())
    if target.json:
        print_json([{"key": s.key, "parent": s.parent, "kind": s.kind} for s in found])
        return
    kinds = {s.key: s.kind for s in found}
    for before, key in branches({s.key: s.parent for s in found}):
        print(f"{before}{key}" + ("" if kinds[key] == "committed" else f" ({kinds[key]})"))


@app.command()
@client_command
async def usage(
    target: Target,
    key: Annotated[list[str] | None, typer.Argument(help="Snapshots; else all of them.", show_default=False)] = None,
    snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs",
) -> None:
    """Show what snapshots take of the disk, each without those below it."""
    from shoal_bus.api import snapshot
    from shoal_bus.errors import NotFound

    from shoal_cli.output import print_json, print_table, size

    slots = asyncio.Semaphore(16)
    async with target.client() as client:
        keys = key
        if keys is None or not keys:
            found = await client.collect(snapshot.SNAPSHOT_LIST.on(snapshotter), snapshot.ListSnapshots())
            keys = [one.key for one in found]

        async def ask(one: str) -> snapshot.Usage | None:
            async with slots:
                try:
                    request = snapshot.SnapshotRequest.of({"key": one})
                    return await client.call(snapshot.SNAPSHOT_USAGE.on(snapshotter), request)
                except NotFound:
                    if key:
                        raise
                    return None  # gone since it was listed

        taken = await asyncio.gather(*(ask(one) for one in keys))
    rows = [(one, used) for one, used in zip(keys, taken, strict=True) if used is not None]
    if target.json:
        print_json([{"key": one, "size": used.size, "inodes": used.inodes} for one, used in rows])
        return
    print_table(("KEY", "SIZE", "INODES"), [(one, size(used.size), str(used.inodes)) for one, used in rows])


@app.command()
@client_command
async def info(
    target: Target, key: Annotated[str, KEY], snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs"
) -> None:
    """Show everything about a snapshot, and how it is mounted, as JSON."""
    from shoal_bus.api import snapshot
    from shoal_bus.errors import FailedPrecondition

    from shoal_cli.output import plain, print_json

    request = snapshot.SnapshotRequest.of({"key": key})
    async with target.client() as client:
        told = plain(await client.call(snapshot.SNAPSHOT_STAT.on(snapshotter), request))
        told["usage"] = plain(await client.call(snapshot.SNAPSHOT_USAGE.on(snapshotter), request))
        try:
            told |= plain(await client.call(snapshot.SNAPSHOT_MOUNTS.on(snapshotter), request))
        except FailedPrecondition:
            told["mounts"] = []  # a committed one isn't mounted by itself
    print_json(told)


@app.command()
@client_command
async def diff(
    target: Target,
    key: Annotated[str, KEY],
    lower: Annotated[str, typer.Argument(help="What it is compared with; else its parent.", show_default=False)] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file, instead of standard output.", show_default=False)
    ] = None,
    compression: Annotated[str, typer.Option(help="none, gzip or zstd.")] = "none",
    snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs",
) -> None:
    """Write what a snapshot changed, as a layer: a tar archive, with whiteouts for what is gone."""
    from shoal_bus.errors import InvalidArgument

    from shoal_cli.output import print_json
    from shoal_cli.snapshot_diff import write_diff

    if output is None and (target.json or sys.stdout.isatty()):
        raise InvalidArgument("a layer is no text", hint="name a file with --output, or use a pipe")
    async with target.client() as client:
        made = await write_diff(client, snapshotter, key, lower, compression, output)
    if target.json:
        print_json(made)


@app.command()
@client_command
async def rm(
    target: Target, key: Annotated[list[str], KEY], snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs"
) -> int:
    """Remove snapshots with their files, in the order they are given: one that another lies on stays."""
    from shoal_bus.api import snapshot

    from shoal_cli.each import for_each

    turn = asyncio.Lock()
    async with target.client() as client:

        async def remove(one: str) -> None:
            async with turn:
                request = snapshot.SnapshotRequest.of({"key": one})
                await client.call(snapshot.SNAPSHOT_REMOVE.on(snapshotter), request)

        return await for_each(key, remove, quiet=target.json)
