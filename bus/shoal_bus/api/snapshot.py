"""`services/snapshot`: snapshots, and layers applied to them.

The resource token of a snapshotter's verbs is the snapshotter's name: `SNAPSHOT_PREPARE.on("overlayfs")` goes to
`shoal.v1.<node>.<namespace>.snapshot.overlayfs.prepare`, and any process that answers those subjects is a snapshotter.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from shoal_bus.events import Topic
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Descriptor, Digest, Filter, Labels, Mount
from shoal_bus.verb import OperationVerb, StreamVerb, Verb, behaves

DEFAULT = "overlayfs"

Kind = Literal["active", "view", "committed"]
_KEY = Field(min_length=1, max_length=1024)


class SnapshotRequest(Request):
    key: str = _KEY


class PrepareSnapshot(Request):
    """An active (or, by `view`, read-only) snapshot `key` on top of the committed one `parent`; empty for none."""

    key: str = _KEY
    parent: str = ""
    labels: Labels = {}


class CommitSnapshot(Request):
    """The active snapshot `key` becomes the committed `name`."""

    name: str = _KEY
    key: str = _KEY
    labels: Labels = {}


class UpdateSnapshot(Request):
    """`fields` names the labels to change, as `labels.<key>`; empty replaces all."""

    key: str = _KEY
    labels: Labels = {}
    fields: list[str] = []


class ListSnapshots(Filter, Request):
    pass


class Mounts(Message):
    mounts: list[Mount]


class SnapshotInfo(Message):
    key: str
    parent: str = ""
    kind: Kind
    labels: Labels = {}
    created_at: datetime
    updated_at: datetime


class Usage(Message):
    """What a snapshot alone takes, without its parents: bytes on disk and inodes."""

    size: int
    inodes: int


SNAPSHOT_PREPARE = Verb(
    "snapshot",
    DEFAULT,
    "prepare",
    PrepareSnapshot,
    Mounts,
    mutates=True,
    behaviour=behaves("An active snapshot, and how to mount it.", "NOT_FOUND", "ALREADY_EXISTS"),
)
SNAPSHOT_VIEW = Verb(
    "snapshot",
    DEFAULT,
    "view",
    PrepareSnapshot,
    Mounts,
    mutates=True,
    behaviour=behaves("A read-only snapshot, and how to mount it.", "NOT_FOUND", "ALREADY_EXISTS"),
)
SNAPSHOT_COMMIT = Verb(
    "snapshot",
    DEFAULT,
    "commit",
    CommitSnapshot,
    SnapshotInfo,
    mutates=True,
    behaviour=behaves(
        "An active snapshot becomes a committed one.", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"
    ),
)
SNAPSHOT_MOUNTS = Verb(
    "snapshot",
    DEFAULT,
    "mounts",
    SnapshotRequest,
    Mounts,
    behaviour=behaves("How to mount an active snapshot or a view.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
SNAPSHOT_STAT = Verb(
    "snapshot", DEFAULT, "stat", SnapshotRequest, SnapshotInfo, behaviour=behaves("A snapshot's record.", "NOT_FOUND")
)
SNAPSHOT_UPDATE = Verb(
    "snapshot",
    DEFAULT,
    "update",
    UpdateSnapshot,
    SnapshotInfo,
    mutates=True,
    behaviour=behaves("Changes a snapshot's labels.", "NOT_FOUND"),
)
SNAPSHOT_LIST = StreamVerb(
    "snapshot", DEFAULT, "list", ListSnapshots, SnapshotInfo, behaviour=behaves("Every snapshot of the namespace.")
)
SNAPSHOT_USAGE = Verb(
    "snapshot", DEFAULT, "usage", SnapshotRequest, Usage, behaviour=behaves("What a snapshot alone takes.", "NOT_FOUND")
)
SNAPSHOT_REMOVE = Verb(
    "snapshot",
    DEFAULT,
    "remove",
    SnapshotRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Removes a snapshot and its files.", "NOT_FOUND", "FAILED_PRECONDITION"),
)

# ----------------------------------------------------------------------------------------------------------------- diff


class ApplyLayer(Request):
    """A layer, applied to what `mounts` describe. `path` is the blob's place on this node (a claim check)."""

    descriptor: Descriptor
    path: str
    mounts: list[Mount]
    diff_id: Digest | None = None
    """What the uncompressed layer must hash to; a mismatch is FAILED_PRECONDITION."""


class AppliedLayer(Message):
    """The uncompressed layer: media type, diff ID and size; and what was written."""

    descriptor: Descriptor
    entries: int


class ApplyProgress(Message):
    """Bytes of the compressed layer that have been read."""

    offset: int = 0
    total: int = 0


class UnpackLayer(Request):
    """prepare, apply and commit in one: the layer becomes the committed snapshot `name` on top of `parent`.

    It is ALREADY_EXISTS-free: a snapshot `name` that is there is the answer. What was begun is undone when it fails.
    """

    name: str = _KEY
    parent: str = ""
    descriptor: Descriptor
    path: str
    diff_id: Digest
    labels: Labels = {}


DIFF_APPLY = OperationVerb(
    "snapshot",
    "diff",
    "apply",
    ApplyLayer,
    AppliedLayer,
    ApplyProgress,
    behaviour=behaves(
        "Applies a layer to a mounted snapshot.", "NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "RESOURCE_EXHAUSTED"
    ),
)
SNAPSHOT_UNPACK = OperationVerb(
    "snapshot",
    DEFAULT,
    "unpack",
    UnpackLayer,
    SnapshotInfo,
    ApplyProgress,
    behaviour=behaves(
        "Makes a layer a committed snapshot.", "NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "RESOURCE_EXHAUSTED"
    ),
)

# --------------------------------------------------------------------------------------------------------------- events


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
