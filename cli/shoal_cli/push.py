"""`shoal push`: progress while an image goes, a bar for each blob on a terminal, a line for each elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

from shoal_bus.api import content
from shoal_bus.client import Client

from shoal_cli.output import short, size
from shoal_cli.telling import tell

if TYPE_CHECKING:
    from rich.progress import TaskID

_OVER = {"done": "", "exists": "is there already", "mounted": "from another repository", "skipped": "not handed on"}


async def push(client: Client, request: content.PushImage, *, quiet: bool = False) -> content.PushedImage:
    """Pushes an image, showing progress on standard error; returns when the registry has it."""
    if quiet:
        return await client.operate(content.IMAGE_PUSH, request)
    with Bars() if sys.stderr.isatty() else PlainLines() as shown:
        pushed = await client.operate(content.IMAGE_PUSH, request, on_progress=shown.update)
        shown.done(pushed)
        return pushed


class PlainLines:
    """A line for each thing that is finished: for logs."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, progress: content.PushProgress) -> None:
        if progress.waiting:
            self._tell(progress.waiting)
        for blob in progress.blobs:
            if blob.state in _OVER:
                self._tell(f"{short(blob.digest)}: {blob.state} ({_OVER[blob.state] or size(blob.size)})")
        if progress.state == "naming":
            self._tell(f"{progress.name}: all blobs are there")

    def done(self, pushed: content.PushedImage) -> None:
        self._tell(f"{pushed.name}: done")

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            tell(f"{line}\n")


class Bars:
    """A bar for each blob, redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]:<9}"),
            DownloadColumn(binary_units=True), TransferSpeedColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, progress: content.PushProgress) -> None:
        for blob in progress.blobs:
            if blob.digest not in self._bars:
                self._bars[blob.digest] = self._progress.add_task(short(blob.digest), total=blob.size, state="")
            sent = blob.size if blob.state in _OVER else blob.offset
            state = "waiting" if progress.waiting and blob.state == "uploading" else blob.state
            self._progress.update(self._bars[blob.digest], completed=sent, state=state)

    def done(self, pushed: content.PushedImage) -> None:
        for bar in self._progress.tasks:
            state = bar.fields["state"] if bar.fields["state"] in _OVER else "done"
            self._progress.update(bar.id, completed=bar.total, state=state)
