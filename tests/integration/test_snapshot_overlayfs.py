"""The overlayfs snapshotter: the suite of all snapshotters, containerd's mount lists, and what the kernel adds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.database import Database
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_snapshot import quota
from shoal_snapshot.overlayfs import Overlayfs
from shoal_snapshot.records import MIGRATIONS
from shoal_snapshot.snapshots import Snapshots
from shoal_snapshot.snapshotter import Snapshotter

from tests.support.disks import xfs
from tests.support.snapshotter_suite import SnapshotterSuite, context, mounted


class TestOverlayfs(SnapshotterSuite):
    def snapshotter(self, root: Path) -> Snapshotter:
        return Overlayfs(root)

    async def test_mount_lists_are_containerds(self, snapshots: Snapshots, tmp_path: Path) -> None:
        at = tmp_path / "root" / "snapshots"
        index = ["index=off"] if Path("/sys/module/overlay/parameters/index").exists() else []
        [first] = await self.prepare(snapshots, "a")
        assert (first.type, first.source, first.options) == ("bind", f"{at}/1/fs", ["rw", "rbind"])
        await self.commit(snapshots, "a", "one")
        [second] = await self.prepare(snapshots, "b", "one")
        upper = [f"workdir={at}/2/work", f"upperdir={at}/2/fs"]
        assert (second.type, second.source) == ("overlay", "overlay")
        assert second.options == [*upper, f"lowerdir={at}/1/fs", *index]
        [look] = await self.view(snapshots, "v", "one")
        assert (look.type, look.source, look.options) == ("bind", f"{at}/1/fs", ["ro", "rbind"])
        await self.commit(snapshots, "b", "two")
        [look] = await self.view(snapshots, "w", "two")
        assert (look.type, look.options) == ("overlay", [f"lowerdir={at}/2/fs:{at}/1/fs", *index])
        [nothing] = await self.view(snapshots, "x")
        assert (nothing.type, nothing.options) == ("bind", ["ro", "rbind"])


class TestFuseOverlayfs(SnapshotterSuite):
    """The same without the kernel's overlays."""

    def snapshotter(self, root: Path) -> Snapshotter:
        return Overlayfs(root, fuse=True)

    async def test_its_mounts_are_containerds(self, snapshots: Snapshots, tmp_path: Path) -> None:
        top = await self.chain(snapshots, tmp_path, 1)
        at = tmp_path / "root" / "snapshots"
        [mount] = await self.prepare(snapshots, "a", top)
        assert (mount.type, mount.source) == ("fuse3.fuse-overlayfs", "overlay")
        assert mount.options == [f"workdir={at}/2/work", f"upperdir={at}/2/fs", f"lowerdir={at}/1/fs"]
        assert snapshots.described().mount_type == "fuse3.fuse-overlayfs"
        with mounted([mount], tmp_path) as root:
            kinds = [
                line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines() if str(root) in line
            ]
            assert kinds == ["fuse.fuse-overlayfs"]


def test_a_root_that_mount_options_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="--root"):
        Overlayfs(tmp_path / "a:b")


class Standing(SnapshotterSuite):
    """A snapshotter to ask single things of."""

    __test__ = False


@pytest.fixture
async def snapshots(tmp_path: Path) -> AsyncIterator[Snapshots]:
    root = tmp_path / "root"
    database = Database(tmp_path / "metadata.db", "test", MIGRATIONS, service="snapshot")
    made = Snapshots(database, Overlayfs(root))
    yield made
    await made.settled()
    database.close()


IDS = {api.UID_MAPPING_LABEL: "0:100000:65536", api.GID_MAPPING_LABEL: "0:200000:1000,1000:300000:1000"}


async def test_owners_are_mapped_where_labels_ask_for_it(snapshots: Snapshots, tmp_path: Path) -> None:
    suite = Standing()
    with mounted(await suite.prepare(snapshots, "a"), tmp_path) as root:
        for name, uid, gid in (("root", 0, 0), ("user", 1000, 1000), ("far", 70_000, 5)):
            (root / name).write_text(name)
            os.chown(root / name, uid, gid)
    await suite.commit(snapshots, "a", "one")
    with mounted(await suite.prepare(snapshots, "b", "one"), tmp_path) as root:
        (root / "above").touch()
    await suite.commit(snapshots, "b", "two")
    for parent in ("one", "two"):
        prepared = await snapshots.prepare(context(), api.PrepareSnapshot(key="c", parent=parent, labels=IDS))
        view = await snapshots.view(context(), api.PrepareSnapshot(key="v", parent=parent, labels=IDS))
        assert prepared.mounts[0].options[-2:] == [
            "uidmap=0:100000:65536", "gidmap=0:200000:1000,1000:300000:1000",
        ]  # fmt: skip
        for mounts in (prepared.mounts, view.mounts):
            with mounted(mounts, tmp_path) as root:
                owners = {p.name: (p.stat().st_uid, p.stat().st_gid) for p in [root / "root", root / "user"]}
                assert owners == {"root": (100_000, 200_000), "user": (101_000, 300_000)}
                assert (root / "far").stat().st_uid == 65_534, "nobody: it isn't mapped"
                assert (root.stat().st_uid, root.stat().st_gid) == (100_000, 200_000)
        with mounted(prepared.mounts, tmp_path) as root:
            (root / "root").write_text("changed by the host's root, copied up with its owner")
            assert ((root / "root").stat().st_uid, (root / "root").stat().st_gid) == (100_000, 200_000)
        for key in ("c", "v"):
            await snapshots.remove(context(), api.SnapshotRequest(key=key))


@pytest.mark.parametrize(
    "labels",
    [
        {api.UID_MAPPING_LABEL: "0:100000:65536"},
        {**IDS, api.UID_MAPPING_LABEL: "0:100000"},
        {**IDS, api.UID_MAPPING_LABEL: "0:100000:0"},
        {**IDS, api.UID_MAPPING_LABEL: "0:4294967295:9"},
        {**IDS, api.GID_MAPPING_LABEL: "0:1:1\n1:2:3"},
        {api.VOLATILE_LABEL: "perhaps"},
    ],
)
async def test_labels_that_make_no_sense_are_refused(snapshots: Snapshots, labels: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="label"):
        await snapshots.prepare(context(), api.PrepareSnapshot(key="a", labels=labels))
    assert snapshots.snapshotter.ids() == set()


async def test_a_volatile_snapshot_is_mounted_again_and_committed(snapshots: Snapshots, tmp_path: Path) -> None:
    suite = Standing()
    top = await suite.chain(snapshots, tmp_path, 1)
    request = api.PrepareSnapshot(key="a", parent=top, labels={api.VOLATILE_LABEL: "true"})
    mounts = (await snapshots.prepare(context(), request)).mounts
    assert "volatile" in mounts[0].options
    with mounted(mounts, tmp_path) as root:
        (root / "file").write_text("kept")
    mounts = (await snapshots.mounts(context(), api.SnapshotRequest(key="a"))).mounts
    with mounted(mounts, tmp_path) as root:
        assert (root / "file").read_text() == "kept"
    await suite.commit(snapshots, "a", "two")
    assert "volatile" not in (await suite.prepare(snapshots, "b", "two"))[0].options
    with mounted(await suite.view(snapshots, "v", "two"), tmp_path) as root:
        assert (root / "file").read_text() == "kept"


def test_a_snapshots_directories_and_what_is_made_in_them_belong_to_its_project(tmp_path: Path) -> None:
    with xfs(tmp_path) as place:
        layer = place / "fs"
        layer.mkdir()
        quota.assign(layer, quota.project_of(7))
        (layer / "directory").mkdir()
        (layer / "directory/file").touch()
        found = subprocess.run(["lsattr", "-pRd", str(layer), *map(str, layer.rglob("*"))], check=True,
                               capture_output=True, text=True)  # fmt: skip
        assert [line.split()[0] for line in found.stdout.splitlines()] == [str((1 << 30) + 7)] * 3


async def test_a_bound_that_no_file_system_keeps_is_refused(snapshots: Snapshots) -> None:
    with pytest.raises(FailedPrecondition, match="without project quotas") as error:
        await snapshots.prepare(context(), api.PrepareSnapshot(key="a", labels={api.SIZE_LABEL: "2M"}))
    assert "prjquota" in error.value.hint
    assert snapshots.snapshotter.ids() == set()
    assert "quota" not in snapshots.described().capabilities


async def test_directories_without_a_record_are_cleaned_up(snapshots: Snapshots) -> None:
    await snapshots.prepare(context(), api.PrepareSnapshot(key="a"))
    for id in (20, 21):
        snapshots.snapshotter.make(id, "active", [])
    assert (await snapshots.cleanup(context(), api.SnapshotterRequest())).directories == 2
    assert snapshots.snapshotter.ids() == {1}
    assert list((snapshots.snapshotter.root / "trash").iterdir()) == []


def test_what_is_probed_leaves_nothing(tmp_path: Path) -> None:
    made = Overlayfs(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["snapshots", "trash"]
    assert made.mount_type == "overlay"
    assert {"remap-ids", "volatile"} <= set(made.capabilities())
