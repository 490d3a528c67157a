"""`image inspect|platforms|check|usage|history|unpack|mount|mounts|unmount`: one image, looked at closely."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal_cli.commands.images import LEASE, PLATFORM, SNAPSHOTTER
from shoal_cli.target import Target, client_command

app = typer.Typer(help="Look closely at images: what of them is here, what they take, what is in them.")

IMAGE = typer.Argument(help="The image's name.", show_default=False)
SNAPSHOTTERS = typer.Option("--snapshotter", help="Whom to ask for snapshots; may be given several times.")
_NOT_WHOLE = 7
_DEFAULT = ["overlayfs"]


@app.command()
@client_command
async def inspect(target: Target, image: Annotated[str, IMAGE], platform: Annotated[str, PLATFORM] = "") -> None:
    """Show everything about an image, as JSON: its record, what of it is here, and its configuration."""
    from shoal_bus.api import content
    from shoal_bus.errors import FailedPrecondition, NotFound

    from shoal_cli.output import plain, print_json
    from shoal_cli.reference import normalise

    name = normalise(image)
    async with target.client() as client:
        check = await client.call(content.IMAGE_CHECK, content.CheckImage(name=name))
        resolved = None
        try:
            resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=name, platform=platform))
        except (NotFound, FailedPrecondition):
            if platform:
                raise  # what was asked for; else it is just not for this node, or no image of files at all
    told = plain(check.image) | {"complete": check.complete, "platforms": plain(check.platforms)}
    if resolved is not None:
        told["resolved"] = plain(resolved.model_copy(update={"image": None}))
        told["resolved"].pop("image")
    print_json(told)


@app.command()
@client_command
async def platforms(
    target: Target, image: Annotated[str, IMAGE], snapshotter: Annotated[list[str] | None, SNAPSHOTTERS] = None
) -> None:
    """List the manifests of an image, and whether what they lead to is here."""
    await _platforms(target, image, snapshotter)


@app.command()
@client_command
async def check(
    target: Target, image: Annotated[str, IMAGE], snapshotter: Annotated[list[str] | None, SNAPSHOTTERS] = None
) -> int | None:
    """Say what of an image is missing here, and where it is unpacked; exit with 7 if this node couldn't run it."""
    return await _platforms(target, image, snapshotter, missing=True)


async def _platforms(target: Target, image: str, snapshotter: list[str] | None, *, missing: bool = False) -> int | None:
    from shoal_bus.api import content

    from shoal_cli.output import print_json, print_table, printable, short, size
    from shoal_cli.reference import normalise

    async with target.client() as client:
        request = content.CheckImage(name=normalise(image), snapshotters=snapshotter or _DEFAULT)
        found = await client.call(content.IMAGE_CHECK, request)
    code = None if found.complete or not missing else _NOT_WHOLE
    if target.json:
        print_json(found)
        return code
    rows = []
    for one in found.platforms:
        state = "complete" if one.complete else "partial" if one.present else "absent"
        shown = size(one.size) if one.complete else f"{size(one.size)} of {size(one.total)}" if one.present else ""
        what = printable(str(one.platform)) if one.platform is not None and one.kind == "image" else one.kind
        rows.append((what, short(one.manifest.digest), state, shown, ",".join(one.unpacked)))
    print_table(("PLATFORM", "DIGEST", "STATE", "SIZE", "UNPACKED"), rows)
    if missing:
        for one in found.platforms:
            for blob in one.missing if one.present else []:
                print(f"missing {blob.digest} ({size(blob.size)}, {printable(blob.media_type)})")
    return code


@app.command()
@client_command
async def usage(
    target: Target,
    image: Annotated[list[str] | None, typer.Argument(help="Images; else all.", show_default=False)] = None,
    snapshotter: Annotated[list[str] | None, SNAPSHOTTERS] = None,
) -> None:
    """Say what images take: their blobs, and the snapshots they are unpacked to."""
    from shoal_bus.api import content

    from shoal_cli.output import print_json, print_table, size
    from shoal_cli.reference import normalise

    names = [normalise(name) for name in image or []]
    async with target.client() as client:
        request = content.ImagesUsageRequest(names=names, snapshotters=snapshotter or _DEFAULT)
        found = await client.call(content.IMAGE_USAGE, request)
    if target.json:
        print_json(found)
        return

    def snapshots(all: list[content.SnapshotterUsage]) -> str:
        return " ".join(f"{one.snapshotter}={size(one.size)}" for one in all)

    rows = [
        (one.name, size(one.size), size(one.unique), str(one.blobs), snapshots(one.snapshots)) for one in found.images
    ]
    rows.append(("together", size(found.size), "", str(found.blobs), snapshots(found.snapshots)))
    print_table(("IMAGE", "SIZE", "UNIQUE", "BLOBS", "SNAPSHOTS"), rows)


@app.command()
@client_command
async def history(
    target: Target,
    image: Annotated[str, IMAGE],
    platform: Annotated[str, PLATFORM] = "",
    no_trunc: Annotated[bool, typer.Option("--no-trunc", help="Whole commands and digests.")] = False,
) -> None:
    """Show how an image was made: its steps, the last one first, with the size of each one's layer as stored."""
    from shoal_bus.api import content

    from shoal_cli.history import steps
    from shoal_cli.output import print_json, print_table, short, size
    from shoal_cli.reference import normalise

    async with target.client() as client:
        request = content.ResolveImage(name=normalise(image), platform=platform)
        found = steps(await client.call(content.IMAGE_RESOLVE, request))
    if target.json:
        print_json([step.json() for step in found])
        return
    rows = []
    for step in found:
        command = step.created_by if no_trunc or len(step.created_by) <= 60 else f"{step.created_by[:59]}…"
        digest = step.digest if no_trunc else short(step.digest)
        rows.append((digest or "-", step.created[:19], size(step.size), command, step.comment))
    print_table(("LAYER", "CREATED", "SIZE", "CREATED BY", "COMMENT"), rows)


@app.command()
@client_command
async def unpack(
    target: Target,
    image: Annotated[str, IMAGE],
    platform: Annotated[str, PLATFORM] = "",
    snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs",
    lease: Annotated[str, LEASE] = "",
) -> None:
    """Unpack an image that is only stored."""
    from shoal_bus.api import content

    from shoal_cli.output import print_json
    from shoal_cli.reference import normalise
    from shoal_cli.signals import interruptible

    request = content.UnpackImage(name=normalise(image), platform=platform, snapshotter=snapshotter)
    async with target.client(lease=lease) as client:
        unpacked = await interruptible(client.operate(content.IMAGE_UNPACK, request))
    if target.json:
        print_json(unpacked)
    else:
        print(f"{unpacked.image.name} {unpacked.chain_id}")


@app.command()
@client_command
async def mount(
    target: Target,
    image: Annotated[str, IMAGE],
    directory: Annotated[Path, typer.Argument(help="A directory that is there.", show_default=False)],
    platform: Annotated[str, PLATFORM] = "",
    snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs",
) -> None:
    """Mount an image read-only, to look into it. Only on the node itself, as root."""
    from shoal_cli.image_mounts import ImageMounts
    from shoal_cli.output import print_json
    from shoal_cli.reference import normalise

    async with target.client() as client:
        mounts = ImageMounts(client, target.find().state, snapshotter)
        made = await mounts.mount(normalise(image), directory, platform=platform)
    if target.json:
        print_json(asdict(made))
    else:
        print(made.directory)


@app.command()
@client_command
async def mounts(target: Target, snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs") -> None:
    """List the images that are mounted."""
    from shoal_cli.image_mounts import ImageMounts
    from shoal_cli.output import print_json, print_table

    async with target.client() as client:
        found = await ImageMounts(client, target.find().state, snapshotter).mounted()
    if target.json:
        print_json([asdict(one) for one in found])
        return
    print_table(("IMAGE", "DIRECTORY"), [(one.image, one.directory) for one in found])


@app.command("unmount")
@client_command
async def unmount_(
    target: Target,
    directory: Annotated[Path, typer.Argument(help="Where an image is mounted.", show_default=False)],
    snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs",
) -> None:
    """Unmount an image."""
    from shoal_cli.image_mounts import ImageMounts

    async with target.client() as client:
        await ImageMounts(client, target.find().state, snapshotter).unmount(directory)
