"""`pull`, `images`, `rmi`."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.target import Target, client_command

app = typer.Typer()

PLATFORM = typer.Option(help="As linux/arm64 or linux/arm/v7; else this node's own.", show_default=False)
PLAIN_HTTP = typer.Option(
    "--plain-http", help="Speak HTTP without TLS; registries on loopback are spoken to so by themselves."
)
USER = typer.Option(
    "--user",
    help="NAME or NAME:PASSWORD for the registry, instead of the node's own; a password left out is asked for.",
    show_default=False,
)


@app.command()
@client_command
async def pull(
    target: Target,
    image: Annotated[str, typer.Argument(help="A reference, as busybox or registry.example/team/app:v1.")],
    platform: Annotated[str, PLATFORM] = "",
    plain_http: Annotated[bool, PLAIN_HTTP] = False,
    user: Annotated[str, USER] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Pull an image from its registry and unpack it."""
    from shoal_bus.api import content

    from shoal_cli.credential import sealed
    from shoal_cli.output import print_json
    from shoal_cli.pull import pull as pull_image
    from shoal_cli.reference import normalise

    name = normalise(image)
    async with target.client() as client:
        credential = await sealed(client, user, name)
        request = content.PullImage(name=name, platform=platform, plain_http=plain_http, credential=credential)
        pulled = await pull_image(client, request, quiet=quiet or target.json)
    if target.json:
        print_json(pulled)
    else:
        print(f"{pulled.name} {pulled.target.digest}")


@app.command()
@client_command
async def images(target: Target) -> None:
    """List images."""
    from shoal_bus.api import content

    from shoal_cli.output import age, print_json, print_table, short

    async with target.client() as client:
        found = await client.collect(content.IMAGE_LIST, content.ListImages())
    if target.json:
        print_json(found)
        return
    rows = [(i.name, short(i.target.digest), age(i.created_at), age(i.updated_at)) for i in sorted(found, key=_name)]
    print_table(("IMAGE", "DIGEST", "CREATED", "UPDATED"), rows)


@app.command()
@client_command
async def rmi(
    target: Target, image: Annotated[list[str], typer.Argument(help="The images to remove.", show_default=False)]
) -> int | None:
    """Remove images, with the blobs and snapshots that nothing else needs."""
    from shoal_bus.api import content

    from shoal_cli.each import for_each
    from shoal_cli.reference import normalise

    async with target.client() as client:
        return await for_each(
            [normalise(name) for name in image],
            lambda name: client.call(content.IMAGE_DELETE, content.DeleteImage(name=name)),
            quiet=target.json,
        )


def _name(image: object) -> str:
    return str(getattr(image, "name", ""))
