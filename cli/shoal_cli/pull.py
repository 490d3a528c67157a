"""`shoal pull`, with progress while an image comes."""

from __future__ import annotations

from shoal_bus.api import content
from shoal_bus.client import Client

from shoal_cli.moving import Shown, showing
from shoal_cli.output import size


async def pull(client: Client, request: content.PullImage, *, quiet: bool = False) -> content.Image:
    """Pulls an image, showing progress on standard error; returns when it is unpacked."""
    if quiet:
        return await client.operate(content.IMAGE_PULL, request)
    with showing() as shown:
        image = await client.operate(content.IMAGE_PULL, request, on_progress=lambda told: _show(shown, told))
        shown.done(f"{image.name}: done")
        return image


def _show(shown: Shown, progress: content.PullProgress) -> None:
    if progress.state == "resolving":
        shown.say(f"{progress.name}: resolving" if progress.name else "resolving")
    if progress.waiting:
        shown.say(progress.waiting)
    for layer in progress.layers:
        over = {"done": size(layer.size), "exists": "exists already"}.get(layer.state, "")
        arrived = layer.size if layer.state in ("extracting", "downloaded") else layer.offset
        shown.blob(layer.digest, layer.size, arrived, layer.state, over)
