"""`services/snapshot`: snapshots, and layers applied to them.

The resource token of a snapshotter's verbs is the snapshotter's name: `SNAPSHOT_PREPARE.on("overlayfs")` goes to
`shoal.v1.<node>.<namespace>.snapshot.overlayfs.prepare`, and any process that answers those subjects is a snapshotter.
"""

from __future__ import annotations

from shoal_bus.api.snapshot.diff import (
    DIFF_APPLY,
    SNAPSHOT_UNPACK,
    AppliedLayer,
    ApplyLayer,
    ApplyProgress,
    UnpackLayer,
)
from shoal_bus.api.snapshot.events import (
    SNAPSHOT_COMMITTED,
    SNAPSHOT_PREPARED,
    SNAPSHOT_REMOVED,
    SnapshotCommitted,
    SnapshotPrepared,
    SnapshotRemoved,
)
from shoal_bus.api.snapshot.gc import (
    GC_CANDIDATES,
    GC_CLOSE,
    GC_LABELLED,
    GC_OPEN,
    GC_SWEEP,
)
from shoal_bus.api.snapshot.snapshots import (
    DEFAULT,
    SNAPSHOT_COMMIT,
    SNAPSHOT_LIST,
    SNAPSHOT_MOUNTS,
    SNAPSHOT_PREPARE,
    SNAPSHOT_REMOVE,
    SNAPSHOT_STAT,
    SNAPSHOT_UPDATE,
    SNAPSHOT_USAGE,
    SNAPSHOT_VIEW,
    CommitSnapshot,
    Kind,
    ListSnapshots,
    Mounts,
    PrepareSnapshot,
    SnapshotInfo,
    SnapshotRequest,
    UpdateSnapshot,
    Usage,
)

__all__ = [
    "DEFAULT",
    "DIFF_APPLY",
    "GC_CANDIDATES",
    "GC_CLOSE",
    "GC_LABELLED",
    "GC_OPEN",
    "GC_SWEEP",
    "SNAPSHOT_COMMIT",
    "SNAPSHOT_COMMITTED",
    "SNAPSHOT_LIST",
    "SNAPSHOT_MOUNTS",
    "SNAPSHOT_PREPARE",
    "SNAPSHOT_PREPARED",
    "SNAPSHOT_REMOVE",
    "SNAPSHOT_REMOVED",
    "SNAPSHOT_STAT",
    "SNAPSHOT_UNPACK",
    "SNAPSHOT_UPDATE",
    "SNAPSHOT_USAGE",
    "SNAPSHOT_VIEW",
    "AppliedLayer",
    "ApplyLayer",
    "ApplyProgress",
    "CommitSnapshot",
    "Kind",
    "ListSnapshots",
    "Mounts",
    "PrepareSnapshot",
    "SnapshotCommitted",
    "SnapshotInfo",
    "SnapshotPrepared",
    "SnapshotRemoved",
    "SnapshotRequest",
    "UnpackLayer",
    "UpdateSnapshot",
    "Usage",
]
