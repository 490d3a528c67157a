"""What a snapshotter is: the directories of snapshots, and how they are mounted.

The life of a snapshot, and everything that can be asked about it, is `snapshots.Snapshots`; a snapshotter is what
differs between file systems, and knows neither keys nor namespaces nor the bus: a snapshot is a number to it.

An image of two layers, unpacked and run, is this:

    snapshotter.make(1, "active", [])                 # a place for the first layer, with nothing below
    extract(layer_1, snapshotter.layer(1))            # written into it directly, nothing is mounted for that
                                                      # 1 is committed now: nobody writes to it any more
    snapshotter.make(2, "active", [1])                # the second layer's place, on top of 1
    extract(layer_2, snapshotter.layer(2), [snapshotter.layer(1)])
                                                      # 2 is committed: the image is there, its chain is 2, 1
    snapshotter.make(3, "active", [2, 1])             # a container's writable layer
    snapshotter.mounts(3, "active", [2, 1])           # what its shim mounts as the root file system
    snapshotter.make(4, "view", [2, 1])               # a look at the image alone
    snapshotter.mounts(4, "view", [2, 1])             # … read-only
    snapshotter.discard(3); snapshotter.discard(4)    # the container is gone, and so is the look

Where a snapshotter is `parallel`, the second layer needn't wait for the first:

    snapshotter.make(2, "active", [])
    extract(layer_2, snapshotter.layer(2), detached=True)
    snapshotter.attach(2, [1])                        # once 1 is committed; 2 is as if it had been made on top of it

Ids come from a database and are never used twice, unless what made a directory died before it said so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from shoal_bus.api.snapshot import Kind
from shoal_bus.types import Mount


class Snapshotter(ABC):
    """The directories of snapshots under one root. Everything here is quick: it happens inside a transaction.

    `parents` are always the ids of a snapshot's whole chain, the nearest first.
    """

    name: ClassVar[str]
    """How it is addressed on the bus."""
    parallel: ClassVar[bool] = False
    """Layers can be extracted before those below them are there: made with no parents, then given them by `attach`."""

    @abstractmethod
    def make(self, id: int, kind: Kind, parents: Sequence[int]) -> None:
        """Makes what a new snapshot needs, whole or not at all.

        What is there under a new id is a dead copy's, and goes to the trash first.
        """

    @abstractmethod
    def mounts(self, id: int, kind: Kind, parents: Sequence[int]) -> list[Mount]:
        """How an active snapshot (writable) or a view (read-only) is mounted. It mounts nothing itself."""

    @abstractmethod
    def layer(self, id: int) -> Path:
        """The directory of what the snapshot alone holds: where its layer is extracted to, and what it takes."""

    def attach(self, id: int, parents: Sequence[int]) -> bool:
        """Gives an active snapshot that was made without parents the ones it is committed with, when its files are
        there; says whether that changed anything on disk. Only where it is `parallel`."""
        raise NotImplementedError(f"{self.name} snapshots have their parents from the beginning")

    @abstractmethod
    def ids(self) -> set[int]:
        """The snapshots of which there is anything on disk."""

    @abstractmethod
    def discard(self, id: int) -> None:
        """Moves a snapshot's directories into the trash at once. Nothing happens if there are none."""

    @abstractmethod
    def empty_trash(self) -> None:
        """Deletes what is in the trash. It takes as long as it takes, and may run in a thread, and twice at a time."""
