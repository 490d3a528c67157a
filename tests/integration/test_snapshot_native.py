"""The native snapshotter: the suite of all snapshotters, and copies with all there is to a file."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import subprocess
from pathlib import Path

import psutil
import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.errors import AlreadyExists, FailedPrecondition, Internal, ResourceExhausted
from shoal_snapshot.copying import copy_tree
from shoal_snapshot.native import Native
from shoal_snapshot.snapshots import Snapshots
from shoal_snapshot.snapshotter import Snapshotter
from shoal_snapshot.worker import Works

from tests.support.disks import MIB, disk, xfs
from tests.support.snapshotter_suite import SnapshotterSuite, context, listing, mounted
from tests.support.trees import grow

ACL = bytes.fromhex(
    "02000000 01000600 ffffffff 02000600 07000000 04000400 ffffffff 10000600 ffffffff 20000400 ffffffff"
)


class TestNative(SnapshotterSuite):
    COPIES = True

    def snapshotter(self, root: Path) -> Snapshotter:
        return Native(root)

    async def test_a_view_is_no_copy(self, snapshots: Snapshots, tmp_path: Path) -> None:
        top = await self.chain(snapshots, tmp_path, 2)
        [mount] = await self.view(snapshots, "v", top)
        assert (mount.type, mount.source) == ("bind", f"{tmp_path}/root/snapshots/2/fs")
        assert not (tmp_path / "root/snapshots/3/fs").exists()

    async def test_a_parent_that_is_being_copied_stays(self, snapshots: Snapshots, tmp_path: Path) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            for number in range(3000):
                (root / f"{number}").touch()
        await self.commit(snapshots, "a", "one")
        preparing = asyncio.create_task(self.prepare(snapshots, "b", "one"))
        async with asyncio.timeout(10):
            while 2 not in snapshots.records.makings():
                await asyncio.sleep(0)
        with pytest.raises(FailedPrecondition, match="snapshot b lies on it"):
            await self.remove(snapshots, "one")
        assert (await snapshots.cleanup(context(), api.SnapshotterRequest())).directories == 0
        assert await self.keys(snapshots) == ["one"], "nobody sees it before it is whole"
        with mounted(await preparing, tmp_path) as root:
            assert len(list(root.iterdir())) == 3000
        await self.remove(snapshots, "b")
        await self.remove(snapshots, "one")

    async def test_a_copy_that_is_cancelled_leaves_nothing(self, snapshots: Snapshots, tmp_path: Path) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            for number in range(5000):
                (root / f"{number}").touch()
        await self.commit(snapshots, "a", "one")
        copying = tmp_path / "root/snapshots/2/fs"
        preparing = asyncio.create_task(self.prepare(snapshots, "b", "one"))
        async with asyncio.timeout(10):
            while not copying.is_dir() or not any(copying.iterdir()):
                await asyncio.sleep(0.001)
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing
        await snapshots.settled()
        assert snapshots.snapshotter.ids() == {1}
        assert snapshots.records.makings() == set()
        assert list((tmp_path / "root/trash").iterdir()) == []
        await self.prepare(snapshots, "b", "one")

    async def test_what_a_dead_copy_was_making_gives_way(self, snapshots: Snapshots, tmp_path: Path) -> None:
        top = await self.chain(snapshots, tmp_path, 1)
        with snapshots.db.write() as tx:
            dead, parents = snapshots.records.begin_making(tx, "default", "b", top)
            snapshots.snapshotter.make(dead, "active", parents)
        (snapshots.snapshotter.layer(dead) / "half").touch()
        snapshots.reconcile()
        assert dead in snapshots.snapshotter.ids(), "its maker may be alive"
        with mounted(await self.prepare(snapshots, "b", top), tmp_path) as root:
            assert [p.name for p in root.iterdir()] == ["file-0"]
        await snapshots.settled()
        assert snapshots.snapshotter.ids() == {1, dead + 1}

    async def test_what_is_refused_is_refused_before_anything_is_copied(
        self, snapshots: Snapshots, tmp_path: Path
    ) -> None:
        top = await self.chain(snapshots, tmp_path, 1)
        await self.prepare(snapshots, "a", top)
        asked = api.PrepareSnapshot(key="b", parent=top, labels={api.VOLATILE_LABEL: "true"})
        with pytest.raises(FailedPrecondition, match="volatile"):
            await snapshots.prepare(context(), asked)
        with pytest.raises(AlreadyExists):
            await self.prepare(snapshots, "a", top)
        assert snapshots.records.makings() == set()
        assert snapshots.snapshotter.ids() == {1, 2}

    async def test_owners_are_mapped_where_labels_ask_for_it(self, snapshots: Snapshots, tmp_path: Path) -> None:
        top = await self.chain(snapshots, tmp_path, 1)
        ids = {api.UID_MAPPING_LABEL: "0:100000:65536", api.GID_MAPPING_LABEL: "0:200000:65536"}
        request = api.PrepareSnapshot(key="a", parent=top, labels=ids)
        with mounted((await snapshots.prepare(context(), request)).mounts, tmp_path) as root:
            assert ((root / "file-0").stat().st_uid, (root / "file-0").stat().st_gid) == (100_000, 200_000)
        assert (snapshots.snapshotter.layer(2) / "file-0").stat().st_uid == 0


def test_a_copy_has_all_that_the_tree_has(tmp_path: Path) -> None:
    os.umask(0o22)
    for seed in range(6):
        source, target = tmp_path / f"source-{seed}", tmp_path / f"target-{seed}"
        source.mkdir()
        target.mkdir()
        grow(source, random.Random(seed))
        (source / "acl").mkdir()
        os.setxattr(source / "acl", "system.posix_acl_default", ACL)
        os.setxattr(source / "acl", "trusted.note", b"\0\xff")
        (source / "acl/file").write_text("x")
        os.setxattr(source / "acl/file", "system.posix_acl_access", ACL)
        (source / "su").write_text("#!")
        os.chown(source / "su", 7, 8)
        (source / "su").chmod(0o6755)
        os.setxattr(source / "su", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
        os.mknod(source / "socket", stat.S_IFSOCK | 0o600)
        source.chmod(0o1750)
        before = os.umask(0)
        try:
            copy_tree(str(source), str(target))
        finally:
            os.umask(before)
        assert listing(target) == listing(source)
        assert os.getxattr(target / "acl", "trusted.note") == b"\0\xff"
        times = [{p.relative_to(r): p.lstat().st_mtime_ns for p in [r, *r.rglob("*")]} for r in (source, target)]
        assert times[0] == times[1]
        assert stat.S_IMODE(target.stat().st_mode) == 0o1750


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    with (source / "sparse").open("wb") as file:
        file.seek(40 * MIB)
        file.write(b"x" * 5000)
        file.truncate(80 * MIB)
    copy_tree(str(source), str(target))
    assert (target / "sparse").stat().st_blocks < 64
    assert (target / "sparse").read_bytes() == (source / "sparse").read_bytes()


def test_a_tree_deeper_than_any_path_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    fd = os.open(source, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("directory", dir_fd=fd)
        inner = os.open("directory", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("a", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.link("a", "b", src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)
    copy_tree(str(source), str(target))
    counted = subprocess.run(["find", str(target), "-links", "2", "-type", "f"], capture_output=True, check=True)
    assert len(counted.stdout.splitlines()) == 2
    for place in (source, target):
        subprocess.run(["rm", "-rf", str(place)], check=True)


def test_copies_share_their_bytes_where_the_file_system_can(tmp_path: Path) -> None:
    with xfs(tmp_path) as place:
        made = Native(place / "native")
        assert "reflink" in made.capabilities()
        source, target = place / "source", place / "target"
        source.mkdir()
        target.mkdir()
        (source / "big").write_bytes(os.urandom(100 * MIB))
        os.sync()
        free = os.statvfs(place).f_bavail
        copy_tree(str(source), str(target))
        os.sync()
        assert (free - os.statvfs(place).f_bavail) * os.statvfs(place).f_frsize < 10 * MIB
        assert (target / "big").read_bytes() == (source / "big").read_bytes()
        (target / "big").write_bytes(b"else")
        assert (source / "big").stat().st_size == 100 * MIB
    assert "reflink" not in Native(tmp_path / "native").capabilities()


async def test_a_copy_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    from shoal_bus.database import Database
    from shoal_snapshot.records import MIGRATIONS

    suite = TestNative()
    with disk(tmp_path, 24 * MIB, ["mkfs.ext4", "-q", "-m", "0"]) as place:
        database = Database(tmp_path / "metadata.db", "test", MIGRATIONS, service="snapshot")
        made = Snapshots(database, Native(place / "native"))
        with mounted(await suite.prepare(made, "a"), tmp_path) as root:
            (root / "big").write_bytes(os.urandom(12 * MIB))
        await suite.commit(made, "a", "one")
        for _ in range(3):
            with pytest.raises(ResourceExhausted, match="no space left"):
                await suite.prepare(made, "b", "one")
            await made.settled()
            assert made.snapshotter.ids() == {1}
            assert made.records.makings() == set()
            assert os.statvfs(place).f_bavail * os.statvfs(place).f_frsize > 8 * MIB
        await made.snapshotter.close()
        database.close()


async def test_a_workers_death_is_told(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for number in range(20_000):
        (source / f"{number}").touch()
    works = Works()
    copying = asyncio.create_task(works.copy(str(source), str(target)))
    async with asyncio.timeout(10):
        while not any(target.iterdir()):
            await asyncio.sleep(0.001)
    (worker,) = [p for p in psutil.Process().children(recursive=True) if p.name() == "shoal-worker"]
    worker.kill()
    with pytest.raises(Internal, match="killed by signal 9"):
        await copying
    small, again = tmp_path / "small", tmp_path / "again"
    for one in (small, again):
        one.mkdir()
    (small / "file").touch()
    await works.copy(str(small), str(again))
    assert (again / "file").exists(), "by another one"
    await works.close()
    assert [p for p in psutil.Process().children(recursive=True) if p.name().startswith("shoal-")] == []
