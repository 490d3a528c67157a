"""Blobs on their way, as `pull` and `push` show them: a bar for each on a terminal, a line for each elsewhere.

with showing() as shown:
    shown.say("resolving")
    shown.blob(digest, size, moved=0, state="downloading")
    shown.done("busybox: done")
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from shoal_cli.output import short
from shoal_cli.telling import tell

if TYPE_CHECKING:
    from rich.progress import TaskID


class Shown(ABC):
    """Where progress goes while the block lasts: standard error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def say(self, line: str) -> None:
        """What is going on besides blobs."""

    @abstractmethod
    def blob(self, digest: str, size: int, moved: int, state: str, over: str = "") -> None:
        """How far a blob is, in bytes; `over` is what is said of one that is finished."""

    @abstractmethod
    def done(self, line: str) -> None:
        """All is finished: the last progress may have been overtaken by the end."""


def showing() -> Shown:
    """Bars on a terminal, lines elsewhere."""
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Lines(Shown):
    """A line for each thing that is finished, once: for logs."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def say(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            tell(f"{line}\n")

    def blob(self, digest: str, size: int, moved: int, state: str, over: str = "") -> None:
        if over:
            self.say(f"{short(digest)}: {state} ({over})")

    def done(self, line: str) -> None:
        self.say(line)


class _Bars(Shown):
    """A bar for each blob, redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]:<11}"),
            DownloadColumn(binary_units=True), TransferSpeedColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self._bars: dict[str, TaskID] = {}
        self._over: set[TaskID] = set()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Nothing: the bars say it."""

    def blob(self, digest: str, size: int, moved: int, state: str, over: str = "") -> None:
        if digest not in self._bars:
            self._bars[digest] = self._progress.add_task(short(digest), total=size, state="")
        bar = self._bars[digest]
        if over:
            self._over.add(bar)
        self._progress.update(bar, completed=size if over else moved, state=state)

    def done(self, line: str) -> None:
        for bar in self._progress.tasks:
            state = bar.fields["state"] if bar.id in self._over else "done"
            self._progress.update(bar.id, completed=bar.total, state=state)
