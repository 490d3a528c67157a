"""The overlayfs snapshotter: a directory for each layer, merged by the kernel.

    <root>/snapshots/<id>/fs      what the layer holds: overlayfs's upper directory, or one of its lower ones
    <root>/snapshots/<id>/work    overlayfs's own, beside the upper directory of an active snapshot
    <root>/trash/                 on its way out

Mount lists are those of containerd's overlayfs snapshotter: one layer alone is a bind mount, as overlayfs can't be
mounted with it (Documentation/filesystems/overlayfs.rst). Where the kernel can't mount overlays here, fuse-overlayfs
does, if it is installed; its mounts have the type `fuse3.fuse-overlayfs`, as those of containerd's fuse-overlayfs
snapshotter.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from shoal_bus.api.snapshot import SIZE_LABEL, VOLATILE_LABEL, Kind
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.types import Mount

from shoal_snapshot import disk
from shoal_snapshot.apply import overlay
from shoal_snapshot.idmaps import host_id, idmap_options, mappings_of, supports_idmaps
from shoal_snapshot.overlay_features import Features, probe
from shoal_snapshot.quota import ProjectQuota, size_of
from shoal_snapshot.snapshotter import NO_LABELS, Snapshotter, refuse
from shoal_snapshot.walking import Descent, names

_SPECIAL = frozenset(':,\\"')
FUSE_TYPE = "fuse3.fuse-overlayfs"
_FUSE_MARKS = frozenset({b".wh..wh..opq", b".wh..opq"})
"""Files by which fuse-overlayfs also says that a directory is opaque."""


class Overlayfs(Snapshotter):
    """Snapshots under `root`, mounted by the kernel, or, with `fuse`, by fuse-overlayfs; None finds out what works.

    FAILED_PRECONDITION for a root that can't stand in mount options, or where neither works.
    """

    name = "overlayfs"
    parallel = True

    def __init__(self, root: Path, *, fuse: bool | None = None) -> None:
        if _SPECIAL & set(str(root)):
            raise FailedPrecondition(
                f"{root}: overlayfs's mount options can't hold such a path", hint='choose a --root without : , \\ and "'
            )
        super().__init__(root)
        self._features = Features((), volatile=False)
        if not fuse:
            try:
                self._features = probe(root)
            except OSError as error:
                if fuse is False or not shutil.which("fuse-overlayfs"):
                    raise FailedPrecondition(
                        f"{root}: the kernel can't mount overlays there: {error.strerror}",
                        hint="install fuse-overlayfs, or use another snapshotter",
                    ) from None
                fuse = True
        elif not shutil.which("fuse-overlayfs"):
            raise FailedPrecondition("fuse-overlayfs isn't installed", hint="install it")
        self.mount_type = FUSE_TYPE if fuse else "overlay"  # type: ignore[misc]
        self._fuse = bool(fuse)
        self._quota = ProjectQuota(self._snapshots)

    def capabilities(self) -> list[str]:
        found = {
            "quota": self._quota.works,
            "remap-ids": not self._fuse and supports_idmaps(str(self._snapshots)),
            "volatile": self._features.volatile,
        }
        return sorted([*super().capabilities(), *(name for name, there in found.items() if there)])

    def make(self, id: int, kind: Kind, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> None:
        mappings = mappings_of(labels) if labels else None
        self._check(labels)
        place = self._place(id)
        try:
            layer = place / "fs"
            layer.mkdir(mode=0o755)
            mode = 0o755
            uid = gid = 0
            if parents:
                # The root directory's own attributes are those of the uppermost layer.
                was = self.layer(parents[0]).stat()
                mode, uid, gid = stat.S_IMODE(was.st_mode), was.st_uid, was.st_gid
                if mappings is not None:  # the upper directory's owners are the host's: the lower ones alone are mapped
                    uid, gid = host_id(mappings[0], uid), host_id(mappings[1], gid)
                os.chown(layer, uid, gid)
            layer.chmod(mode)
            if kind == "active":
                work = place / "work"
                work.mkdir(mode=0o711)
                if SIZE_LABEL in labels:
                    self._quota.limit(id, size_of(labels), [layer, work])
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

    def mounts(self, id: int, kind: Kind, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> list[Mount]:
        writable = kind == "active"
        idmap = idmap_options(labels) if labels else []
        if not parents or (len(parents) == 1 and not writable):
            source = self.layer(parents[0] if parents else id)
            return [Mount(type="bind", source=str(source), options=["rw" if writable else "ro", "rbind", *idmap])]
        options = []
        if writable:
            options += [f"workdir={self._snapshots / str(id) / 'work'}", f"upperdir={self.layer(id)}"]
        place = str(self._snapshots)  # a hundred paths, joined as text: as objects they take longer than all the rest
        options.append("lowerdir=" + ":".join(f"{place}/{parent}/fs" for parent in parents))
        if writable and labels.get(VOLATILE_LABEL) == "true":
            # The kernel refuses what a volatile mount left, as its files may not be on disk. Whoever asked for that
            # has said that they needn't be.
            with suppress(FileNotFoundError):
                shutil.rmtree(self._snapshots / str(id) / "work" / "work" / "incompat")
            options.append("volatile")
        return [Mount(type=self.mount_type, source="overlay", options=[*options, *self._features.options, *idmap])]

    def seal(self, id: int) -> None:
        """A layer that fuse-overlayfs has written becomes one that the kernel could have."""
        if not self._fuse:
            return
        with disk.opened(str(self.layer(id))) as fd, Descent(fd) as place:
            todo = [names(place.fd)]
            while todo:
                if not todo[-1]:
                    todo.pop()
                    if todo:
                        place.up()
                    continue
                name = todo[-1].pop()
                if name in _FUSE_MARKS:
                    times = os.fstat(place.fd)
                    os.unlink(name, dir_fd=place.fd)
                    overlay.make_opaque(place.fd)
                    os.utime(place.fd, ns=(times.st_atime_ns, times.st_mtime_ns))
                elif stat.S_ISDIR(os.stat(name, dir_fd=place.fd, follow_symlinks=False).st_mode):
                    place.down(name)
                    todo.append(names(place.fd))

    def discard(self, id: int) -> None:
        self._quota.forget(id)
        super().discard(id)

    def _check(self, labels: Mapping[str, str]) -> None:
        """FAILED_PRECONDITION or INVALID_ARGUMENT for labels that can't be heeded."""
        if self._fuse:
            refuse(labels, "fuse-overlayfs", VOLATILE_LABEL)
        elif labels.get(VOLATILE_LABEL, "true") != "true":
            raise InvalidArgument(f"label {VOLATILE_LABEL}: {labels[VOLATILE_LABEL][:60]!r} isn't true")
        elif VOLATILE_LABEL in labels and not self._features.volatile:
            refuse(labels, "overlayfs", VOLATILE_LABEL)
        if idmap_options(labels):
            if self._fuse:
                raise FailedPrecondition("fuse-overlayfs can't mount with mapped owners", hint="leave the labels out")
            supports_idmaps(str(self._snapshots), demanded=True)
