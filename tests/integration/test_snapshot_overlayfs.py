"""The overlayfs snapshotter: the suite of all snapshotters, containerd's mount lists, and what the kernel adds."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.database import Database
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.types import Mount
from shoal_snapshot import disk, overlay_features, quota
from shoal_snapshot.diff.compute import compute
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

    async def test_what_it_writes_the_kernel_reads_and_a_layer_holds(
        self, snapshots: Snapshots, tmp_path: Path
    ) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            for name in ("gone", "anew", "kept"):
                (root / name).mkdir()
                (root / name / "old").write_text(name)
        await self.commit(snapshots, "a", "one")
        upper, lower = await self.prepare(snapshots, "b", "one"), await self.view(snapshots, "v", "one")
        with mounted(upper, tmp_path) as root:
            for name in ("gone", "anew"):
                (root / name / "old").unlink()
                (root / name).rmdir()
            (root / "anew").mkdir()
            (root / "anew/new").touch()
            (root / "kept/old").rename(root / "kept/new")
        told = ["anew/", "anew/new", "anew/.wh.old", ".wh.gone", "kept/", "kept/new", "kept/.wh.old"]
        assert layer_of(tmp_path, lower, upper) == told
        await self.commit(snapshots, "b", "two")
        kernels = Overlayfs(tmp_path / "root", fuse=False)
        with mounted(kernels.mounts(9, "view", [2, 1]), tmp_path) as root:
            assert sorted(str(p.relative_to(root)) for p in root.rglob("*")) == [
                "anew", "anew/new", "kept", "kept/new",
            ]  # fmt: skip
        assert layer_of(tmp_path, lower, await self.view(snapshots, "w", "two")) == told


def layer_of(directory: Path, lower: list[Mount], upper: list[Mount]) -> list[str]:
    """The names in the layer that makes `upper` of `lower`."""
    file = directory / "layer"
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    mounts = {"lower": [m.model_dump() for m in lower], "upper": [m.model_dump() for m in upper]}
    try:
        compute({**mounts, "compression": "none"}, lambda _: None, output)
    finally:
        os.close(output)
    with tarfile.open(file) as archive:
        return [member.name + ("/" if member.isdir() else "") for member in archive]


def test_what_the_kernel_does_by_default_is_turned_off_where_layers_would_not_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = tmp_path / "parameters"
    parameters.mkdir()
    for name, value in (("index", "N"), ("metacopy", "Y"), ("redirect_dir", "Y")):
        (parameters / name).write_text(f"{value}\n")
    monkeypatch.setattr(overlay_features, "_PARAMETERS", parameters)
    assert overlay_features.probe(tmp_path).options == ("index=off", "metacopy=off", "redirect_dir=off")
    (parameters / "index").unlink()
    (parameters / "metacopy").write_text("N\n")
    assert overlay_features.probe(tmp_path).options == ("redirect_dir=off",)


USERNS = """
import os, sys
from pathlib import Path
from shoal_snapshot.overlay_features import probe
print(" ".join(probe(Path(sys.argv[1])).options))
"""


def test_a_user_namespace_mounts_with_attributes_of_users(tmp_path: Path) -> None:
    told = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", USERNS, str(tmp_path)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert told.stdout.split() == ["index=off", "userxattr"]


def test_where_the_kernel_cannot_fuse_does(tmp_path: Path) -> None:
    """What a program serves can't be the kernel's upper directory."""
    for name in ("below", "upper", "work"):
        (tmp_path / name).mkdir()
    options = [f"{option}dir={tmp_path}/{name}" for option, name in
               (("lower", "below"), ("upper", "upper"), ("work", "work"))]  # fmt: skip
    with mounted([Mount(type="fuse3.fuse-overlayfs", source="overlay", options=options)], tmp_path) as place:
        with pytest.raises(FailedPrecondition, match="can't mount overlays there") as error:
            Overlayfs(place / "overlayfs", fuse=False)
        assert "fuse-overlayfs" in error.value.hint
        assert Overlayfs(place / "overlayfs").mount_type == "fuse3.fuse-overlayfs"


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


def test_what_a_killed_prober_left_goes_with_the_next_one_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    left = tmp_path / "probe-of-a-dead-one"
    (left / "volatile-work" / "work" / "incompat").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with disk.scratch(str(tmp_path), b"probe-") as name:
            assert not left.exists()
            other = pool.submit(Overlayfs, tmp_path)
            with pytest.raises(TimeoutError):
                other.result(0.2)
            assert (tmp_path / os.fsdecode(name)).is_dir()
        other.result(10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["snapshots", "trash"]
