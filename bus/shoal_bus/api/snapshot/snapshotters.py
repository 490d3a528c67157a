"""Snapshotters: which there are on a node, what each can do, and how one is tidied up."""

from __future__ import annotations

from shoal_bus.api.snapshot.snapshots import DEFAULT
from shoal_bus.message import Message, Request
from shoal_bus.verb import StreamVerb, Verb, behaves

SIZE_LABEL = "shoal/snapshot.size"
"""A label of an active snapshot: how many bytes may be written to it, where the file system has quotas. An integer,
perhaps with `k`, `M` or `G` behind it, for powers of 1024."""
VOLATILE_LABEL = "shoal/snapshot.volatile"
"""A label of an active snapshot: `true` lets its mount skip every sync to disk (overlayfs's `volatile`)."""
UID_MAPPING_LABEL, GID_MAPPING_LABEL = "containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"
"""Labels of an active snapshot or a view: `container:host:size`, several with commas between. It is mounted so that
the owners in the image appear as those on the host."""


class SnapshotterRequest(Request):
    pass


class SnapshotterInfo(Message):
    """A snapshotter that works on this node.

    `capabilities` are of: `remap-ids` (heeds the labels of ID mappings), `quota` (heeds the label of a size),
    `volatile` (heeds that label), `parallel` (layers are unpacked before those below them are there), `reflink` (copies
    share their bytes), `whole` (each snapshot's directory holds all of its tree, so that its usage counts what lies
    below, too).
    """

    name: str
    root: str = ""
    """Where its snapshots lie on the node."""
    mount_type: str = ""
    """How its snapshots are usually mounted: `overlay`, `bind`, …"""
    capabilities: list[str] = []


class CleanedUp(Message):
    """How many directories without a record there were. They have been deleted."""

    directories: int


SNAPSHOTTER_LIST = StreamVerb(
    "snapshot",
    "snapshotter",
    "list",
    SnapshotterRequest,
    SnapshotterInfo,
    behaviour=behaves("Every snapshotter of the node's snapshot service.", whole_node=True),
)
SNAPSHOT_INFO = Verb(
    "snapshot",
    DEFAULT,
    "info",
    SnapshotterRequest,
    SnapshotterInfo,
    behaviour=behaves("What a snapshotter is and can do.", whole_node=True),
)
SNAPSHOT_CLEANUP = Verb(
    "snapshot",
    DEFAULT,
    "cleanup",
    SnapshotterRequest,
    CleanedUp,
    mutates=True,
    behaviour=behaves(
        "Deletes what lies in a snapshotter's directories without a record, and what was removed.", whole_node=True
    ),
)
