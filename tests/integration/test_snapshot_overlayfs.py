"""The overlayfs snapshotter: the suite of all snapshotters, and containerd's mount lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from shoal_bus.errors import FailedPrecondition
from shoal_snapshot.overlayfs import Overlayfs
from shoal_snapshot.snapshots import Snapshots
from shoal_snapshot.snapshotter import Snapshotter

from tests.support.snapshotter_suite import SnapshotterSuite


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


def test_a_root_that_mount_options_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="--root"):
        Overlayfs(tmp_path / "a:b")
