"""`shoal pull`: progress while an image comes, a bar for each layer on a terminal, a line for each elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from shoal_bus.api import content
from shoal_bus.client import Client

from shoal_cli.output import short, size
from shoal_cli.telling import tell

if TYPE_CHECKING:
    from rich.progress import TaskID

_OVER = ("done", "exists")


class Shown(Protocol):
    """Where progress goes while the block lasts."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def update(self, progress: content.PullProgress) -> None: ...
    def done(self, image: content.Image) -> None: ...


async def pull(client: Client, request: content.PullImage, *, quiet: bool = False) -> content.Image:
    """Pulls an image, showing progress on standard error; returns when it is unpacked."""
    if quiet:
        return await client.operate(content.IMAGE_PULL, request)
    shown: Shown = Bars() if sys.stderr.isatty() else PlainLines()
    with shown:
        image = await client.operate(content.IMAGE_PULL, request, on_progress=shown.update)
        shown.done(image)  # the last progress may have been overtaken by the end
        return image


class PlainLines:
    """A line for each thing that is finished: for logs."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, progress: content.PullProgress) -> None:
        if progress.state == "resolving":
            self._tell(f"{progress.name}: resolving" if progress.name else "resolving")
        if progress.waiting:
            self._tell(progress.waiting)
        for layer in progress.layers:
            if layer.state in _OVER:
                note = "exists already" if layer.state == "exists" else size(layer.size)
                self._tell(f"{short(layer.digest)}: {layer.state} ({note})")

    def done(self, image: content.Image) -> None:
        self._tell(f"{image.name}: done")

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            tell(f"{line}\n")


class Bars:
    """A bar for each layer, redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]:<11}"),
            DownloadColumn(binary_units=True), TransferSpeedColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, progress: content.PullProgress) -> None:
        for layer in progress.layers:
            if layer.digest not in self._bars:
                self._bars[layer.digest] = self._progress.add_task(short(layer.digest), total=layer.size, state="")
            arrived = layer.size if layer.state in (*_OVER, "extracting", "downloaded") else layer.offset
            self._progress.update(self._bars[layer.digest], completed=arrived, state=layer.state)

    def done(self, image: content.Image) -> None:
        for bar in self._progress.tasks:
            self._progress.update(bar.id, completed=bar.total, state="done")
