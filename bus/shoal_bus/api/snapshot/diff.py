"""Layers: applied to snapshots, and computed from them."""

from __future__ import annotations

from pydantic import Field

from shoal_bus.api.snapshot.snapshots import DEFAULT, KEY, SnapshotInfo
from shoal_bus.message import Message, Request
from shoal_bus.types import Descriptor, Digest, Labels, Mount
from shoal_bus.verb import OperationVerb, behaves

PAYLOADS = "payloads"
"""The directory of payloads, below a node's state directory."""


class ApplyLayer(Request):
    """A layer, applied to what `mounts` describe.

    `path` is the blob's place on this node (a claim check), below the content service's directory; whatever else it
    names is NOT_FOUND.

    If it fails, a snapshot that was empty is empty again. One that wasn't (every one on a parent, with snapshotters
    that are `whole`) keeps a part of the layer, as containerd's do: it can still be mounted and removed, but
    committing it, or applying another layer to it, is FAILED_PRECONDITION.
    """

    descriptor: Descriptor
    path: str
    mounts: list[Mount]
    diff_id: Digest | None = None
    """What the uncompressed layer must hash to; a mismatch is FAILED_PRECONDITION."""
    sync: bool = False
    """Have it on disk before the answer. What is committed is synced then in any case."""
    payloads: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9_-]{0,127})?$")
    """What stream processors get at their file descriptor 3: a file below `<state>/payloads` that somebody (root) has
    put there, JSON of base64 by the processors' names. It may be a key, so that it doesn't come by the bus."""


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


class ComputeDiff(Request):
    """The layer that makes `upper` of `lower`, written into content under its own digest.

    Both are mount lists of this node's snapshots in this namespace; an empty `lower` is an empty directory. Equal trees
    make equal layers, byte for byte.
    """

    lower: list[Mount] = []
    upper: list[Mount]
    media_type: str = "application/vnd.oci.image.layer.v1.tar+gzip"
    """An OCI or Docker layer's: uncompressed, gzip or zstd."""
    ref: str = Field(default="", max_length=512)
    """The ingest it is written to; empty for one of its own."""
    labels: Labels = {}
    """Of the blob, besides `containerd.io/uncompressed`, which is its diff ID."""
    source_date_epoch: int | None = Field(default=None, ge=0, lt=1 << 33)
    """Seconds since 1970: no file in the layer is newer, and what is removed has this time."""


class ComputedDiff(Message):
    """The layer's descriptor (its diff ID is also the annotation `containerd.io/uncompressed`)."""

    descriptor: Descriptor
    diff_id: Digest
    entries: int


class ComputeProgress(Message):
    """Bytes of the layer, as tar and as compressed."""

    uncompressed: int = 0
    written: int = 0


DIFF_APPLY = OperationVerb(
    "snapshot",
    "diff",
    "apply",
    ApplyLayer,
    AppliedLayer,
    ApplyProgress,
    quiet_seconds=0.1,
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
    quiet_seconds=0.1,
    behaviour=behaves(
        "Makes a layer a committed snapshot.", "NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "RESOURCE_EXHAUSTED"
    ),
)
DIFF_COMPUTE = OperationVerb(
    "snapshot",
    "diff",
    "compute",
    ComputeDiff,
    ComputedDiff,
    ComputeProgress,
    quiet_seconds=0.1,
    behaviour=behaves(
        "Makes a layer of what differs between two mounts, and a blob of that.",
        "NOT_FOUND",
        "FAILED_PRECONDITION",
        "ABORTED",
        "RESOURCE_EXHAUSTED",
    ),
)
