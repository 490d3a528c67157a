"""The btrfs snapshotter: a subvolume for each snapshot, and a snapshot of its parent's for each on top of another.

A view is its parent's subvolume, read-only. What a container makes of further subvolumes is deleted with it, and
becomes plain directories when it is committed: a snapshot would leave them out.

    <root>/snapshots/<id>/fs      the subvolume; of a view there is none
    <root>/trash/                 on its way out
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal_bus.api.snapshot import SIZE_LABEL, VOLATILE_LABEL, Kind
from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Mount

from shoal_snapshot import disk, subvolumes
from shoal_snapshot.copying import copy_tree
from shoal_snapshot.idmaps import idmap_options, supports_idmaps
from shoal_snapshot.quota import size_of
from shoal_snapshot.snapshotter import NO_LABELS, Snapshotter, refuse
from shoal_snapshot.walking import Descent, names, open_parent

_FS = b"fs"


class Btrfs(Snapshotter):
    """Snapshots under `root`. FAILED_PRECONDITION where that isn't on a btrfs."""

    name = "btrfs"
    whole = True

    def __init__(self, root: Path) -> None:
        root.parent.mkdir(parents=True, exist_ok=True)
        if not subvolumes.supported(str(root.parent)):
            raise FailedPrecondition(f"{root}: isn't on a btrfs", hint="choose a --root on one, or another snapshotter")
        super().__init__(root)

    def capabilities(self) -> list[str]:
        more = ["quota"] if self._limits() else []
        more += ["remap-ids"] if supports_idmaps(str(self._snapshots)) else []
        return sorted([*super().capabilities(), "reflink", *more])

    def make(self, id: int, kind: Kind, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> None:
        refuse(labels, self.name, VOLATILE_LABEL)
        if idmap_options(labels):
            supports_idmaps(str(self._snapshots), demanded=True)
        if SIZE_LABEL in labels:
            size_of(labels)
        place = self._place(id)
        try:
            if not parents:
                with disk.opened(str(place)) as fd:
                    subvolumes.create(fd, _FS)
                self.layer(id).chmod(0o755)
                self._limit(id, kind, labels)
        except BaseException:
            self._trash.take(place)
            raise

    async def fill(self, id: int, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> None:
        def snapshot() -> None:
            with disk.opened(str(self.layer(parents[0]))) as source, disk.opened(str(self.layer(id).parent)) as place:
                subvolumes.snapshot(source, place, _FS)
            self._limit(id, "active", labels)

        making = asyncio.ensure_future(asyncio.to_thread(snapshot))
        try:
            await asyncio.shield(making)
        finally:
            await asyncio.wait({making})

    def mounts(self, id: int, kind: Kind, parents: Sequence[int], labels: Mapping[str, str] = NO_LABELS) -> list[Mount]:
        writable = kind == "active"
        source = self.layer(parents[0] if parents and not writable else id)
        options = ["rw" if writable else "ro", "rbind", *idmap_options(labels)]
        return [Mount(type="bind", source=str(source), options=options)]

    def seal(self, id: int) -> None:
        with disk.opened(str(self.layer(id))) as root:
            for path in subvolumes.nested(root):
                _make_plain(root, path)

    def usage(self, id: int, parents: Sequence[int]) -> tuple[int, int]:
        """What the snapshot doesn't share with its parent: an inode that both have, unchanged, is the same one.

        Its root directory counts, as with other snapshotters.
        """
        below = _inodes(str(self.layer(parents[0]))) if parents else {}
        below.pop((0, subvolumes.BTRFS_FIRST_FREE_OBJECTID), None)
        own = {inode: what for inode, what in _inodes(str(self.layer(id))).items() if below.get(inode) != what}
        return sum(blocks for _, blocks in own.values()) * 512, len(own)

    def _delete(self, name: bytes, dir_fd: int) -> None:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            if _FS in names(fd):
                subvolumes.destroy(fd, _FS)
        finally:
            os.close(fd)
        super()._delete(name, dir_fd)

    def _limit(self, id: int, kind: Kind, labels: Mapping[str, str]) -> None:
        if kind != "active" or SIZE_LABEL not in labels:
            return
        try:
            with disk.opened(str(self.layer(id))) as fd:
                subvolumes.limit(fd, size_of(labels))
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EINVAL, errno.ENOENT):
                raise
            raise FailedPrecondition(
                f"label {SIZE_LABEL}: {self.root} is on a btrfs without quotas",
                hint="enable them (btrfs quota enable), or leave the label out",
            ) from None

    def _limits(self) -> bool:
        """Whether quotas are enabled: tried on a subvolume of its own."""
        with subvolumes.scratch(str(self.root), b"probe-") as fd:
            try:
                subvolumes.limit(fd, 1 << 30)
            except OSError:
                return False
        return True


def _make_plain(root: int, path: bytes) -> None:
    """Puts a plain directory with the same content in a subvolume's place."""
    name, aside = path.rpartition(b"/")[2], b".shoal-" + os.urandom(8).hex().encode()
    parent = open_parent(root, path)
    try:
        times = os.fstat(parent)
        os.mkdir(aside, 0o700, dir_fd=parent)
        here = os.fsencode(f"/proc/self/fd/{parent}/")
        copy_tree(os.fsdecode(here + name), os.fsdecode(here + aside))
        subvolumes.destroy(parent, name)
        os.rename(aside, name, src_dir_fd=parent, dst_dir_fd=parent)
        os.utime(parent, ns=(times.st_atime_ns, times.st_mtime_ns))
    finally:
        os.close(parent)


def _inodes(path: str) -> dict[tuple[int, int], tuple[int, int]]:
    """Of every inode of a tree, when it was changed and how many blocks it has; by the subvolume's number and its own.

    The number is how deep in subvolumes it lies, as two snapshots' own ones differ.
    """
    found: dict[tuple[int, int], tuple[int, int]] = {}
    with disk.opened(path) as fd, Descent(fd) as place:
        depth, todo = [0], [names(place.fd)]
        _note(found, 0, os.fstat(place.fd))
        while todo:
            if not todo[-1]:
                todo.pop()
                depth.pop()
                if todo:
                    place.up()
                continue
            name = todo[-1].pop()
            try:
                status = os.stat(name, dir_fd=place.fd, follow_symlinks=False)
                inside = depth[-1] + subvolumes.is_subvolume(status)
                _note(found, inside, status)
                if status.st_mode & 0o170000 == 0o040000:
                    place.down(name)
                    depth.append(inside)
                    todo.append(names(place.fd))
            except FileNotFoundError:
                continue  # gone meanwhile
    return found


def _note(found: dict[tuple[int, int], tuple[int, int]], depth: int, status: os.stat_result) -> None:
    found[depth, status.st_ino] = (status.st_ctime_ns, status.st_blocks)
