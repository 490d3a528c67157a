"""The btrfs snapshotter on a loop device: the suite of all snapshotters, and what only subvolumes have."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.database import Database
from shoal_bus.errors import FailedPrecondition
from shoal_runtime.shim.mounts import mounts_below
from shoal_snapshot.btrfs import Btrfs
from shoal_snapshot.records import MIGRATIONS
from shoal_snapshot.snapshots import Snapshots
from shoal_snapshot.snapshotter import Snapshotter

from tests.support.disks import btrfs
from tests.support.snapshotter_suite import SnapshotterSuite, context, mounted


def subvolumes(place: Path) -> list[str]:
    """The paths of all subvolumes of a btrfs."""
    listed = subprocess.run(["btrfs", "subvolume", "list", str(place)], check=True, capture_output=True, text=True)
    return sorted(line.split(" path ", 1)[1] for line in listed.stdout.splitlines())


class TestBtrfs(SnapshotterSuite):
    def snapshotter(self, root: Path) -> Snapshotter:
        return Btrfs(root)

    @pytest.fixture
    async def snapshots(self, tmp_path: Path) -> AsyncIterator[Snapshots]:
        with btrfs(tmp_path) as place:
            (tmp_path / "root").symlink_to(place)
            root = place / "btrfs"
            database = Database(tmp_path / "metadata.db", "test", MIGRATIONS, service="snapshot")
            made = Snapshots(database, self.snapshotter(root))
            yield made
            await made.settled()
            database.close()
            assert mounts_below(str(tmp_path)) == [str(place)]

    async def test_each_snapshot_is_a_subvolume_until_it_is_removed(self, snapshots: Snapshots, tmp_path: Path) -> None:
        top = await self.chain(snapshots, tmp_path, 2)
        await self.prepare(snapshots, "a", top)
        await self.view(snapshots, "v", top)
        assert subvolumes(tmp_path / "root") == [f"btrfs/snapshots/{id}/fs" for id in (1, 2, 3)]
        for key in ("a", "v", "l1", "l0"):
            await self.remove(snapshots, key)
        await snapshots.settled()
        assert subvolumes(tmp_path / "root") == []

    async def test_subvolumes_in_a_snapshot_are_removed_with_it(self, snapshots: Snapshots, tmp_path: Path) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            (root / "d").mkdir()
            for name in ("d/one", "d/one/two", "d/one/two/three"):
                subprocess.run(["btrfs", "-q", "subvolume", "create", str(root / name)], check=True)
                (root / name / "file").write_text(name)
        await self.remove(snapshots, "a")
        await snapshots.settled()
        assert subvolumes(tmp_path / "root") == []
        assert snapshots.snapshotter.ids() == set()

    async def test_subvolumes_in_a_snapshot_are_directories_of_its_commit(
        self, snapshots: Snapshots, tmp_path: Path
    ) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            (root / "d").mkdir()
            for name in ("d/one", "d/one/two"):
                subprocess.run(["btrfs", "-q", "subvolume", "create", str(root / name)], check=True)
                (root / name / "file").write_text(name)
                (root / name).chmod(0o710)
            os.utime(root / "d", ns=(1, 1))
        await self.commit(snapshots, "a", "one")
        assert subvolumes(tmp_path / "root") == ["btrfs/snapshots/1/fs"]
        with mounted(await self.prepare(snapshots, "b", "one"), tmp_path) as root:
            assert (root / "d/one/two/file").read_text() == "d/one/two"
            assert (root / "d/one").stat().st_mode & 0o7777 == 0o710
            assert (root / "d").stat().st_mtime_ns == 1
            assert sorted(p.name for p in (root / "d/one").iterdir()) == ["file", "two"]

    async def test_what_a_snapshot_may_take_is_bounded(self, snapshots: Snapshots, tmp_path: Path) -> None:
        request = api.PrepareSnapshot(key="a", labels={api.SIZE_LABEL: "8M"})
        with pytest.raises(FailedPrecondition, match="without quotas"):
            await snapshots.prepare(context(), request)
        assert snapshots.snapshotter.ids() == set()
        assert "quota" not in snapshots.described().capabilities
        subprocess.run(["btrfs", "quota", "enable", str(tmp_path / "root")], check=True)
        assert "quota" in snapshots.described().capabilities
        with mounted((await snapshots.prepare(context(), request)).mounts, tmp_path) as root:
            write_until_full(root, 8 << 20)
        await self.commit(snapshots, "a", "one")
        above = api.PrepareSnapshot(key="b", parent="one", labels={api.SIZE_LABEL: "4M"})
        with mounted((await snapshots.prepare(context(), above)).mounts, tmp_path) as root:
            write_until_full(root, 4 << 20)


def write_until_full(root: Path, limit: int) -> None:
    """Writes until the quota says no: not before half of it, and not after all."""
    written = 0
    with pytest.raises(OSError, match="quota exceeded"), (root / "big").open("wb", buffering=0) as file:  # noqa: PT012
        while written < 4 * limit:
            written += file.write(os.urandom(1 << 18))
            os.fsync(file.fileno())
    assert limit // 2 <= written <= limit


def test_what_a_killed_prober_left_goes_with_the_next_one(tmp_path: Path) -> None:
    with btrfs(tmp_path) as place:
        for name in (".probe-of-a-dead-one", "btrfs/probe-of-a-dead-one"):
            (place / name).parent.mkdir(exist_ok=True)
            subprocess.run(["btrfs", "-q", "subvolume", "create", str(place / name)], check=True)
        assert "quota" not in Btrfs(place / "btrfs").capabilities()
        assert subvolumes(place) == []
        assert sorted(p.name for p in place.iterdir()) == ["btrfs"]
        assert sorted(p.name for p in (place / "btrfs").iterdir()) == ["snapshots", "trash"]


def test_another_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="--root"):
        Btrfs(tmp_path / "btrfs")
    assert list(tmp_path.iterdir()) == []
