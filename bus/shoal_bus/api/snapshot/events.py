"""What is told of snapshots."""

from __future__ import annotations

from shoal_bus.events import Topic
from shoal_bus.message import Message


class SnapshotPrepared(Message):
    key: str
    parent: str = ""
    snapshotter: str = ""


class SnapshotCommitted(Message):
    key: str
    name: str
    snapshotter: str = ""


class SnapshotRemoved(Message):
    key: str
    snapshotter: str = ""


SNAPSHOT_PREPARED = Topic("snapshot", "/snapshot/prepare", SnapshotPrepared, "key")
SNAPSHOT_COMMITTED = Topic("snapshot", "/snapshot/commit", SnapshotCommitted, "key")
SNAPSHOT_REMOVED = Topic("snapshot", "/snapshot/remove", SnapshotRemoved, "key")
