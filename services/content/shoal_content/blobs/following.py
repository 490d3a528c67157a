"""Blobs in the making, for the snapshot service to read along: each under a name of its own, for one layer of one pull.

A name is a hard link to the ingest's file, or to the blob that it has become, so it keeps what its reader needs. An
ingest that starts over gets a new file, and the name is moved to that: its reader sees that it is another one. When
the pull is over the name goes, and whoever still reads knows that nobody wants that any more.

Names can't be guessed: they are for whoever was told.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shoal_bus.database import Database

from shoal_content.blobs.layout import Layout


class Following:
    """The names, below the directory of one node's blobs."""

    def __init__(self, database: Database, layout: Layout) -> None:
        self._db = database
        self._directory = layout.root / "following"
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def path(self, nonce: str, at: int) -> Path:
        """The name for a pull's layer number `at`; `nonce` is the pull's own secret."""
        return self._directory / f"{nonce}-{at}"

    def point(self, name: Path, file: Path) -> None:
        """Has a name lead to a file, at once, whatever it led to before."""
        beside = name.with_name(f"{name.name}.new")
        beside.unlink(missing_ok=True)
        os.link(file, beside, follow_symlinks=False)
        beside.rename(name)
        beside.unlink(missing_ok=True)  # rename(2) leaves it where both were links to the same file

    def forget(self, nonce: str) -> None:
        """Takes away the names of a pull that is over."""
        self._remove(lambda name: name.partition("-")[0] == nonce)

    def sweep(self) -> None:
        """Takes away names that no pull has: its row comes before them."""
        with self._db.write() as tx:
            nonces = {row["nonce"] for row in tx.execute("SELECT nonce FROM pulls")}
            self._remove(lambda name: name.partition("-")[0] not in nonces)

    def _remove(self, superfluous: Callable[[str], bool]) -> None:
        for name in os.listdir(self._directory):  # noqa: PTH208 (names are all that is wanted)
            if superfluous(name):
                with suppress(FileNotFoundError):
                    (self._directory / name).unlink()
