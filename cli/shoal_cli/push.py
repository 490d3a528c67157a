"""`shoal push`, with progress while an image goes."""

from __future__ import annotations

from shoal_bus.api import content
from shoal_bus.client import Client

from shoal_cli.moving import Shown, showing
from shoal_cli.output import size

_OVER = {"exists": "is there already", "mounted": "from another repository", "skipped": "not handed on"}


async def push(client: Client, request: content.PushImage, *, quiet: bool = False) -> content.PushedImage:
    """Pushes an image, showing progress on standard error; returns when the registry has it."""
    if quiet:
        return await client.operate(content.IMAGE_PUSH, request)
    with showing() as shown:
        pushed = await client.operate(content.IMAGE_PUSH, request, on_progress=lambda told: _show(shown, told))
        shown.done(f"{pushed.name}: done")
        return pushed


def _show(shown: Shown, progress: content.PushProgress) -> None:
    if progress.waiting:
        shown.say(progress.waiting)
    for blob in progress.blobs:
        state = "waiting" if progress.waiting and blob.state == "uploading" else blob.state
        over = size(blob.size) if blob.state == "done" else _OVER.get(blob.state, "")
        shown.blob(blob.digest, blob.size, blob.offset, state, over)
    if progress.state == "naming":
        shown.say(f"{progress.name}: all blobs are there")
