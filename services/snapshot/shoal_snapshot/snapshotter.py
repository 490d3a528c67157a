"""What a snapshotter is: the directories of snapshots, and how they are mounted.

The life of a snapshot, and everything that can be asked about it, is `snapshots.Snapshots`; a snapshotter is what
differs between file systems, and knows neither keys nor namespaces nor the bus: a snapshot is a number to it.

An image of two layers, unpacked and run, is this with overlayfs, where a directory holds one layer's changes:

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

A snapshotter whose directories hold the `whole` tree begins an active snapshot with what its parent holds, and layers
are carried out on that. What takes long is not done in `make`, which happens inside a transaction, but in `fill`:

    snapshotter.make(2, "active", [1])                # recorded as being made, not yet to be seen by anyone
    await snapshotter.fill(2, [1])                    # a copy of 1, outside of any transaction
    extract(layer_2, snapshotter.layer(2), [])        # the snapshot is recorded now; whiteouts remove what they name

If the process dies in `fill`, whoever is asked next, or starts next, discards 2. Ids come from a database and are never
used twice, unless what made a directory died before it said so.

To add a snapshotter: a subclass, one line in `service.SNAPSHOTTERS`, and the suite of all snapshotters
(`tests/support/snapshotter_suite.py`) run on it. A process of its own that answers a snapshotter's subjects is one,
too; the same suite runs over the bus.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from shoal_bus.api.snapshot import Kind
from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Mount

from shoal_snapshot import disk
from shoal_snapshot.trash import Trash

NO_LABELS: Mapping[str, str] = {}


class Snapshotter(ABC):
    """The directories of snapshots under one root: `<root>/snapshots/<id>/fs` is where a snapshot's files are.

    Making one raises FAILED_PRECONDITION, with the reason, where its kind can't work: that is really tried.

    `parents` are always the ids of a snapshot's whole chain, the nearest first. `labels` are the snapshot's; one that
    asks for what the snapshotter can't do is FAILED_PRECONDITION, one that makes no sense INVALID_ARGUMENT.
    Everything but `fill`, `seal`, `usage` and `empty_trash` is quick: it happens inside a transaction.
    """

    name: ClassVar[str]
    """How it is addressed on the bus."""
    parallel: ClassVar[bool] = False
    """Layers can be extracted before those below them are there: made with no parents, then given them by `attach`."""
    mount_type: ClassVar[str] = "bind"
    """How its snapshots are usually mounted."""
    whole: ClassVar[bool] = False
    """A snapshot's directory holds the whole tree, and not what was changed alone: `fill` brings in what lies below."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._snapshots = root / "snapshots"
        self._snapshots.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._trash = Trash(root / "trash", remove=self._delete)

    def capabilities(self) -> list[str]:
        """What it can do besides, by the names that `SnapshotterInfo` lists."""
        can = {"whole": self.whole, "parallel": self.parallel}
        return [name for name, does in can.items() if does]

    @abstractmethod
    def make(self, id: int, kind: Kind, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> None:
        """Makes what a new snapshot needs, whole or not at all.

        What is there under a new id is a dead copy's, and goes to the trash first.
        """

    async def fill(  # noqa: B027 (most have nothing to do)
        self, id: int, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS
    ) -> None:
        """Brings what a new active snapshot's parents hold into it, where that isn't the mount's affair.

        When it is cancelled, nothing writes to the snapshot any more; what is there then is discarded by the caller.
        """

    @abstractmethod
    def mounts(self, id: int, kind: Kind, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> list[Mount]:
        """How an active snapshot (writable) or a view (read-only) is mounted. It mounts nothing itself."""

    def layer(self, id: int) -> Path:
        """The directory where a snapshot's layer is extracted to: what it alone holds, or all of its tree (`whole`)."""
        return self._snapshots / str(id) / "fs"

    def seal(self, id: int) -> None:  # noqa: B027 (most have nothing to do)
        """Makes an active snapshot ready to be committed; its files are on disk only after that. May take long."""

    def usage(self, id: int, parents: Sequence[int]) -> tuple[int, int]:
        """Bytes and inodes on disk that a snapshot takes, as it is now. FileNotFoundError if it is gone."""
        return disk.usage(str(self.layer(id)))

    def attach(self, id: int, parents: Sequence[int]) -> bool:
        """Gives an active snapshot that was made without parents the ones it is committed with, when its files are
        there; says whether that changed anything on disk. Only where it is `parallel`."""
        raise NotImplementedError(f"{self.name} snapshots have their parents from the beginning")

    def ids(self) -> set[int]:
        """The snapshots of which there is anything on disk."""
        return {int(entry.name) for entry in self._snapshots.iterdir() if entry.name.isdigit()}

    def discard(self, id: int) -> None:
        """Moves a snapshot's directories into the trash at once. Nothing happens if there are none."""
        self._trash.take(self._snapshots / str(id))

    def empty_trash(self) -> None:
        """Deletes what is in the trash. It takes as long as it takes, and may run in a thread, and twice at a time."""
        self._trash.empty()

    async def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Ends what it has running besides; nobody asks anything of it any more."""

    # ------------------------------------------------------------------------------------------------- for subclasses

    def _place(self, id: int) -> Path:
        """A new directory for a snapshot; whatever is in its way goes to the trash."""
        place = self._snapshots / str(id)
        try:
            place.mkdir(mode=0o700)
        except FileExistsError:
            self._trash.take(place)
            place.mkdir(mode=0o700)
        return place

    def _delete(self, name: bytes, dir_fd: int) -> None:
        """Deletes one directory of the trash."""
        disk.remove(name, dir_fd)


def refuse(labels: Mapping[str, str], name: str, *unknown: str) -> None:
    """FAILED_PRECONDITION for labels that ask `name` for what it can't do."""
    for label in unknown:
        if label in labels:
            raise FailedPrecondition(f"snapshotter {name}: can't do what label {label} asks for", hint="leave it out")
