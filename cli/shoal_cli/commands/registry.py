"""`push`, `referrers`."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.commands.images import PLAIN_HTTP, USER
from shoal_cli.target import Target, client_command

app = typer.Typer()


@app.command()
@client_command
async def push(
    target: Target,
    image: Annotated[str, typer.Argument(help="An image of the node.")],
    destination: Annotated[
        str, typer.Argument(help="A reference, as registry.example/team/app:v1; else where its name says.")
    ] = "",
    platform: Annotated[
        str, typer.Option(help="Of several, this one, as linux/arm64; else this node's own.", show_default=False)
    ] = "",
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="All of them, with their index.")] = False,
    plain_http: Annotated[bool, PLAIN_HTTP] = False,
    user: Annotated[str, USER] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Push an image to a registry."""
    from shoal_bus.api import content
    from shoal_bus.errors import InvalidArgument

    from shoal_cli.credential import sealed
    from shoal_cli.output import print_json
    from shoal_cli.push import push as push_image
    from shoal_cli.reference import normalise

    if platform and all_platforms:
        raise InvalidArgument("--platform and --all-platforms: one of them")
    name, to = normalise(image), normalise(destination or image)
    async with target.client() as client:
        request = content.PushImage(
            name=name, destination=to, platform=platform, all_platforms=all_platforms, plain_http=plain_http,
            credential=await sealed(client, user, to),
        )  # fmt: skip
        pushed = await push_image(client, request, quiet=quiet or target.json)
    if target.json:
        print_json(pushed)
    else:
        print(f"{pushed.name} {pushed.target.digest}")


@app.command()
@client_command
async def referrers(
    target: Target,
    image: Annotated[str, typer.Argument(help="A reference; it is looked for in its registry.")],
    artifact_type: Annotated[str, typer.Option("--type", help="Only those of this artifact type.")] = "",
    plain_http: Annotated[bool, PLAIN_HTTP] = False,
    user: Annotated[str, USER] = "",
) -> None:
    """List what refers to an image in its registry: signatures, SBOMs, attestations."""
    from shoal_bus.api import content

    from shoal_cli.credential import sealed
    from shoal_cli.output import print_json, print_table, size
    from shoal_cli.reference import normalise

    name = normalise(image)
    async with target.client() as client:
        request = content.ListReferrers(
            name=name, artifact_type=artifact_type, plain_http=plain_http, credential=await sealed(client, user, name)
        )
        found = await client.collect(content.REFERRER_LIST, request, timeout=120)
    if target.json:
        print_json(found)
        return
    rows = [(one.descriptor.digest, one.artifact_type, size(one.descriptor.size)) for one in found]
    print_table(("DIGEST", "TYPE", "SIZE"), rows)
