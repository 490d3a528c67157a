"""The native snapshotter: a directory with the whole tree for each snapshot. It works on every file system.

An active snapshot is a copy of its parent, which shares its bytes with that where the file system can (reflinks). A
view is its parent's directory, read-only.

    <root>/snapshots/<id>/fs      all the files of the snapshot; of a view there is none
    <root>/trash/                 on its way out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal_bus.api.snapshot import SIZE_LABEL, VOLATILE_LABEL, Kind
from shoal_bus.types import Mount

from shoal_snapshot.copying import clones
from shoal_snapshot.idmaps import idmap_options, supports_idmaps
from shoal_snapshot.quota import ProjectQuota, size_of
from shoal_snapshot.snapshotter import NO_LABELS, Snapshotter, refuse
from shoal_snapshot.worker import Works


class Native(Snapshotter):
    """Snapshots under `root`."""

    name = "native"
    whole = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._quota = ProjectQuota(self._snapshots)
        self._works = Works()

    def capabilities(self) -> list[str]:
        place = str(self._snapshots)
        found = {"reflink": clones(place), "quota": self._quota.works, "remap-ids": supports_idmaps(place)}
        return sorted([*super().capabilities(), *(name for name, there in found.items() if there)])

    def make(self, id: int, kind: Kind, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> None:
        refuse(labels, self.name, VOLATILE_LABEL)
        options = idmap_options(labels)
        place = self._place(id)
        try:
            if kind == "view" and parents:
                return
            layer = place / "fs"
            layer.mkdir(mode=0o755)
            layer.chmod(0o755)
            if kind == "active" and SIZE_LABEL in labels:
                self._quota.limit(id, size_of(labels), [layer])
            if options:
                supports_idmaps(str(layer), demanded=True)
        except BaseException:
            self._trash.take(place)
            raise

    async def fill(self, id: int, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> None:
        source, target = str(self.layer(parents[0])), str(self.layer(id))
        await self._works.copy(source, target)

    def mounts(self, id: int, kind: Kind, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> list[Mount]:
        writable = kind == "active"
        source = self.layer(parents[0] if parents and not writable else id)
        options = ["rw" if writable else "ro", "rbind", *idmap_options(labels)]
        return [Mount(type="bind", source=str(source), options=options)]

    def discard(self, id: int) -> None:
        self._quota.forget(id)
        super().discard(id)

    async def close(self) -> None:
        await self._works.close()
