"""Directories on their way out: gone from their place at once, deleted when there is time."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import structlog

from shoal_snapshot import disk

log = structlog.get_logger(__name__)


class Trash:
    """A directory whose entries are nobody's any more. It must be on the file system of what is moved into it.

    `remove` deletes one of them, by its name in an open directory.
    """

    def __init__(self, directory: Path, remove: Callable[[bytes, int], None] = disk.remove) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory, self._remove = directory, remove

    def take(self, path: Path) -> None:
        """Moves `path` in; it may be gone already."""
        try:
            path.rename(self._directory / f"{path.name}-{secrets.token_hex(6)}")
        except FileNotFoundError:
            return

    def empty(self) -> None:
        """Deletes everything. Several may do so at once; what can't be deleted is logged, and stays."""
        with disk.opened(str(self._directory)) as fd:
            for name in os.listdir(fd):  # noqa: PTH208 (an open directory)
                try:
                    self._remove(os.fsencode(name), fd)
                except OSError as error:
                    log.warning("trash.kept", path=str(self._directory / name), error=error.strerror)
