"""The native snapshotter: the suite of all snapshotters, and copies with all there is to a file."""

from __future__ import annotations

from pathlib import Path

from shoal_snapshot.native import Native
from shoal_snapshot.snapshotter import Snapshotter

from tests.support.snapshotter_suite import SnapshotterSuite


class TestNative(SnapshotterSuite):
    COPIES = True

    def snapshotter(self, root: Path) -> Snapshotter:
        return Native(root)
