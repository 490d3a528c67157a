"""The overlayfs snapshotter: a directory for each layer, merged by the kernel.

    <root>/snapshots/<id>/fs      what the layer holds: overlayfs's upper directory, or one of its lower ones
    <root>/snapshots/<id>/work    overlayfs's own, beside the upper directory of an active snapshot
    <root>/trash/                 on its way out

Mount lists are those of containerd's overlayfs snapshotter: one layer alone is a bind mount, as overlayfs can't be
mounted with it (Documentation/filesystems/overlayfs.rst).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from shoal_bus.api.snapshot import Kind
from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Mount

from shoal_snapshot.snapshotter import Snapshotter
from shoal_snapshot.trash import Trash

_INDEX = Path("/sys/module/overlay/parameters/index")
_SPECIAL = frozenset(':,\\"')


class Overlayfs(Snapshotter):
    """Snapshots under `root`. FAILED_PRECONDITION for a root that can't stand in mount options."""

    name = "overlayfs"
    parallel = True

    def __init__(self, root: Path) -> None:
        if _SPECIAL & set(str(root)):
            raise FailedPrecondition(
                f"{root}: overlayfs's mount options can't hold such a path", hint='choose a --root without : , \\ and "'
            )
        self._snapshots = root / "snapshots"
        self._snapshots.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._trash = Trash(root / "trash")
        # Two overlays of the same upper directory, one after another, are this snapshotter's normal case.
        self._options = ["index=off"] if _INDEX.exists() else []

    def make(self, id: int, kind: Kind, parents: Sequence[int]) -> None:
        place = self._snapshots / str(id)
        try:
            place.mkdir(mode=0o700)
        except FileExistsError:
            self._trash.take(place)
            place.mkdir(mode=0o700)
        try:
            layer = place / "fs"
            layer.mkdir(mode=0o755)
            mode = 0o755
            if parents:
                # The root directory's own attributes are those of the uppermost layer.
                was = self.layer(parents[0]).stat()
                mode = stat.S_IMODE(was.st_mode)
                os.chown(layer, was.st_uid, was.st_gid)
            layer.chmod(mode)
            if kind == "active":
                (place / "work").mkdir(mode=0o711)
        except BaseException:
            self._trash.take(place)
            raise

    def attach(self, id: int, parents: Sequence[int]) -> bool:
        layer, was = self.layer(id), self.layer(parents[0]).stat()
        now = layer.stat()
        owner, mode = (was.st_uid, was.st_gid), stat.S_IMODE(was.st_mode)
        if ((now.st_uid, now.st_gid), stat.S_IMODE(now.st_mode)) == (owner, mode):
            return False
        os.chown(layer, *owner)
        layer.chmod(mode)
        return True

    def mounts(self, id: int, kind: Kind, parents: Sequence[int]) -> list[Mount]:
        writable = kind == "active"
        if not parents or (len(parents) == 1 and not writable):
            source = self.layer(parents[0] if parents else id)
            return [Mount(type="bind", source=str(source), options=["rw" if writable else "ro", "rbind"])]
        options = []
        if writable:
            options += [f"workdir={self._snapshots / str(id) / 'work'}", f"upperdir={self.layer(id)}"]
        options.append("lowerdir=" + ":".join(str(self.layer(parent)) for parent in parents))
        return [Mount(type="overlay", source="overlay", options=options + self._options)]

    def layer(self, id: int) -> Path:
        return self._snapshots / str(id) / "fs"

    def ids(self) -> set[int]:
        return {int(entry.name) for entry in self._snapshots.iterdir() if entry.name.isdigit()}

    def discard(self, id: int) -> None:
        self._trash.take(self._snapshots / str(id))

    def empty_trash(self) -> None:
        self._trash.empty()
