"""`pull`, `images`, `tag`, `rmi`, `save`, `load`, `convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer()

PLATFORM = typer.Option(help="As linux/arm64 or linux/arm/v7; else this node's own.", show_default=False)
ALL_PLATFORMS = typer.Option("--all-platforms", help="All that the image has.")
PLAIN_HTTP = typer.Option(
    "--plain-http", help="Speak HTTP without TLS; registries on loopback are spoken to so by themselves."
)
USER = typer.Option(
    "--user",
    help="NAME or NAME:PASSWORD for the registry, instead of the node's own; a password left out is asked for.",
    show_default=False,
)
SNAPSHOTTER = typer.Option(help="Where layers are unpacked to.")
NO_UNPACK = typer.Option("--no-unpack", help="Store the image, and unpack nothing.")
LEASE = typer.Option(
    "--lease", help="A lease (see `shoal lease`): it holds what this makes, until it ends.", show_default=False
)
QUIET = typer.Option("--quiet", "-q", help="No progress.")


@app.command()
@client_command
async def pull(
    target: Target,
    image: Annotated[str, typer.Argument(help="A reference, as busybox or registry.example/team/app:v1.")],
    platform: Annotated[str, PLATFORM] = "",
    all_platforms: Annotated[bool, ALL_PLATFORMS] = False,
    plain_http: Annotated[bool, PLAIN_HTTP] = False,
    user: Annotated[str, USER] = "",
    lease: Annotated[str, LEASE] = "",
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Pull an image from its registry and unpack it."""
    from shoal_bus.api import content

    from shoal_cli.credential import sealed
    from shoal_cli.output import print_json
    from shoal_cli.pull import pull as pull_image
    from shoal_cli.reference import normalise

    name = normalise(image)
    async with target.client(lease=lease) as client:
        credential = await sealed(client, user, name)
        request = content.PullImage(
            name=name, platform=platform, all_platforms=all_platforms, plain_http=plain_http, credential=credential
        )
        pulled = await pull_image(client, request, quiet=quiet or target.json)
    if target.json:
        print_json(pulled)
    else:
        print(f"{pulled.name} {pulled.target.digest}")


@app.command()
@client_command
async def images(
    target: Target,
    filter: Annotated[
        list[str] | None,
        typer.Option("--filter", help='In containerd\'s language, as name~=busybox or labels."a"==b; any may match.'),
    ] = None,
    digests: Annotated[bool, typer.Option("--digests", help="Whole digests, and the media types.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,
) -> None:
    """List images."""
    from shoal_bus.api import content

    from shoal_cli.output import age, print_json, print_table, printable, short

    async with target.client() as client:
        found = await client.collect(content.IMAGE_LIST, content.ListImages(filters=filter or []))
    found = sorted(found, key=lambda image: image.name)
    if target.json:
        print_json(found)
    elif quiet:
        for image in found:
            print(image.name)
    elif digests:
        rows = [(i.name, i.target.digest, printable(i.target.media_type), age(i.updated_at)) for i in found]
        print_table(("IMAGE", "DIGEST", "TYPE", "UPDATED"), rows)
    else:
        rows = [(i.name, short(i.target.digest), age(i.created_at), age(i.updated_at)) for i in found]
        print_table(("IMAGE", "DIGEST", "CREATED", "UPDATED"), rows)


@app.command()
@client_command
async def tag(
    target: Target,
    image: Annotated[str, typer.Argument(help="The image.", show_default=False)],
    name: Annotated[list[str], typer.Argument(help="Further names for it.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", "-f", help="Also a name that another image has.")] = False,
) -> int | None:
    """Give an image further names."""
    from shoal_bus.api import content
    from shoal_bus.image_reference import parse

    from shoal_cli.each import for_each
    from shoal_cli.reference import normalise

    source = normalise(image)
    names = [str(parse(one)) for one in name]
    async with target.client() as client:
        return await for_each(
            names,
            lambda one: client.call(content.IMAGE_TAG, content.TagImage(source=source, name=one, force=force)),
            quiet=target.json,
        )


@app.command()
@client_command
async def rmi(
    target: Target,
    image: Annotated[list[str], typer.Argument(help="The images to remove.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", "-f", help="It is no error if one isn't there.")] = False,
) -> int | None:
    """Remove images, with the blobs and snapshots that nothing else needs."""
    from shoal_bus.api import content
    from shoal_bus.errors import NotFound

    from shoal_cli.each import for_each
    from shoal_cli.reference import normalise

    async with target.client() as client:

        async def remove(name: str) -> None:
            try:
                await client.call(content.IMAGE_DELETE, content.DeleteImage(name=name))
            except NotFound:
                if not force:
                    raise

        return await for_each([normalise(name) for name in image], remove, quiet=target.json)


@app.command()
@client_command
async def load(
    target: Target,
    input: Annotated[str, typer.Option("--input", "-i", help="The archive; else standard input.")] = "",
    base_name: Annotated[
        str, typer.Option(help="For images that have but a tag; images of other names are left out.")
    ] = "",
    digests: Annotated[bool, typer.Option("--digests", help="Also name images by their digests.")] = False,
    platform: Annotated[str, PLATFORM] = "",
    all_platforms: Annotated[bool, ALL_PLATFORMS] = False,
    snapshotter: Annotated[str, SNAPSHOTTER] = "overlayfs",
    no_unpack: Annotated[bool, NO_UNPACK] = False,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE for the images.")] = None,
    lease: Annotated[str, LEASE] = "",
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Load images from an archive: an OCI image layout, or what `docker save` writes, compressed or not."""
    from shoal_bus.api import content

    from shoal_cli.archive import Bar, incoming
    from shoal_cli.output import print_json
    from shoal_cli.request import labels
    from shoal_cli.signals import interruptible

    given = labels(label or [])
    with incoming(target.find().state, input) as archive, Bar(quiet=quiet or target.json) as bar:
        request = content.ImportImages(
            archive=archive, base_name=base_name, digests=digests, platform=platform, all_platforms=all_platforms,
            snapshotter="" if no_unpack else snapshotter, labels=given,
        )  # fmt: skip
        async with target.client(lease=lease) as client:
            loaded = await interruptible(
                client.operate(
                    content.IMAGE_IMPORT,
                    request,
                    on_progress=lambda told: bar.update(told.state, told.bytes_done, told.bytes_total),
                )
            )
    if target.json:
        print_json(loaded.images)
        return
    for image in loaded.images:
        print(f"{image.name} {image.target.digest}")


@app.command()
@client_command
async def save(
    target: Target,
    image: Annotated[list[str], typer.Argument(help="The images.", show_default=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="The archive; else standard output.")] = "",
    platform: Annotated[str, PLATFORM] = "",
    all_platforms: Annotated[bool, ALL_PLATFORMS] = False,
    skip_non_distributable: Annotated[
        bool, typer.Option("--skip-non-distributable", help="Without layers that mustn't be passed on.")
    ] = False,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Save images to an archive that `shoal load`, skopeo, umoci, `ctr image import` and `docker load` read.

    It is an OCI image layout with Docker's manifest.json; the same images make the same bytes.
    """
    from shoal_bus.api import content

    from shoal_cli.archive import Bar, outgoing
    from shoal_cli.reference import normalise
    from shoal_cli.signals import interruptible

    names = [normalise(name) for name in image]
    with outgoing(target.find().state, output) as archive, Bar(quiet=quiet) as bar:
        request = content.ExportImages(
            archive=archive, names=names, platform=platform, all_platforms=all_platforms,
            skip_non_distributable=skip_non_distributable,
        )  # fmt: skip
        async with target.client() as client:
            await interruptible(
                client.operate(
                    content.IMAGE_EXPORT,
                    request,
                    on_progress=lambda told: bar.update(told.state, told.bytes_done, told.bytes_total),
                )
            )


@app.command()
@client_command
async def convert(
    target: Target,
    source: Annotated[str, typer.Argument(help="The image.", show_default=False)],
    name: Annotated[str, typer.Argument(help="The name of what it becomes.", show_default=False)],
    zstd: Annotated[bool, typer.Option("--zstd", help="Layers compressed by zstd.")] = False,
    gzip: Annotated[bool, typer.Option("--gzip", help="Layers compressed by gzip.")] = False,
    uncompressed: Annotated[bool, typer.Option("--uncompressed", help="Layers that aren't compressed.")] = False,
    oci: Annotated[bool, typer.Option("--oci", help="OCI's media types instead of Docker's.")] = False,
    platform: Annotated[str, PLATFORM] = "",
    all_platforms: Annotated[bool, ALL_PLATFORMS] = False,
    lease: Annotated[str, LEASE] = "",
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Make an image of another one, of the same files: other compression, other media types."""
    from shoal_bus.api import content
    from shoal_bus.errors import InvalidArgument
    from shoal_bus.image_reference import parse

    from shoal_cli.archive import Bar
    from shoal_cli.output import print_json
    from shoal_cli.reference import normalise
    from shoal_cli.signals import interruptible

    wanted = [kind for kind, given in (("zstd", zstd), ("gzip", gzip), ("none", uncompressed)) if given]
    if len(wanted) > 1:
        raise InvalidArgument("--zstd, --gzip and --uncompressed: one of them at most")
    request = content.ConvertImage.of(
        {
            "source": normalise(source), "name": str(parse(name)), "compression": wanted[0] if wanted else None,
            "oci": oci, "platform": platform, "all_platforms": all_platforms,
        }
    )  # fmt: skip
    async with target.client(lease=lease) as client:
        with Bar(quiet=quiet or target.json) as bar:
            made = await interruptible(
                client.operate(
                    content.IMAGE_CONVERT,
                    request,
                    on_progress=lambda told: bar.update(
                        f"layer {told.layers_done} of {told.layers_total}", told.bytes_done, told.bytes_total
                    ),
                )
            )
    if target.json:
        print_json(made)
    else:
        print(f"{made.name} {made.target.digest}")
