"""Layers: applied to snapshots."""

from __future__ import annotations

from shoal_bus.api.snapshot.snapshots import DEFAULT, KEY, SnapshotInfo
from shoal_bus.message import Message, Request
from shoal_bus.types import Descriptor, Digest, Labels, Mount
from shoal_bus.verb import OperationVerb, behaves


class ApplyLayer(Request):
    """A layer, applied to what `mounts` describe.

    `path` is the blob's place on this node (a claim check), below the content service's directory; whatever else it
    names is NOT_FOUND.
    """

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

    An `early` one comes before all that it needs. What is at `path` grows until it has the descriptor's size, and its
    writer, who verifies it, gives the same file the blob's own name then; if it was wrong, another file takes its place
    at `path`; if the path goes, this is ABORTED. `parent` is committed later, and waited for. Whoever asks cancels what
    will never come.
    """

    name: str = KEY
    parent: str = ""
    descriptor: Descriptor
    path: str
    diff_id: Digest
    labels: Labels = {}
    early: bool = False


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
