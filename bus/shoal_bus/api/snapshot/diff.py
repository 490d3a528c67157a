"""Layers: applied to snapshots."""

from __future__ import annotations

from shoal_bus.api.snapshot.snapshots import DEFAULT, KEY, SnapshotInfo
from shoal_bus.message import Message, Request
from shoal_bus.types import Descriptor, Digest, Labels, Mount
from shoal_bus.verb import OperationVerb, behaves


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

    name: str = KEY
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
