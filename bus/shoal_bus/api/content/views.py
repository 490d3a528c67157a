"""What of an image is here, what it takes, and further names and snapshots for it."""

from __future__ import annotations

from pydantic import Field

from shoal_bus.api.content.images import Image
from shoal_bus.message import Message, Request
from shoal_bus.types import Descriptor, Platform
from shoal_bus.verb import OperationVerb, Verb, behaves


class TagImage(Request):
    """`name` for what `source` names; ALREADY_EXISTS for one that names something else, unless `force` moves it."""

    source: str = Field(min_length=1, max_length=4096)
    name: str = Field(min_length=1, max_length=4096)
    force: bool = False


class CheckImage(Request):
    """`snapshotters` are asked whether they have it unpacked."""

    name: str = Field(min_length=1, max_length=4096)
    snapshotters: list[str] = ["overlayfs"]


class PlatformCheck(Message):
    """One manifest of an image: what of it is here."""

    manifest: Descriptor
    platform: Platform | None = None
    kind: str = "image"
    """`image`; `attestation`, about another manifest of the index; `artifact`, which has no files to unpack."""
    present: bool = False
    """The manifest itself is here: what else there should be is known."""
    complete: bool = False
    missing: list[Descriptor] = []
    size: int = 0
    """Bytes of what is here, and (`total`) of all that it leads to, as far as that is known."""
    total: int = 0
    layers: int = 0
    chain_id: str = ""
    unpacked: list[str] = []
    """The snapshotters that have all its layers."""


class ImageCheck(Message):
    image: Image
    complete: bool
    """Whether all that this node needs of it is here: the image for its own platform, or all of what isn't an index."""
    platforms: list[PlatformCheck]


class ImagesUsageRequest(Request):
    """`names` empty: every image of the namespace."""

    names: list[str] = Field(default=[], max_length=1024)
    snapshotters: list[str] = ["overlayfs"]


class SnapshotterUsage(Message):
    """What an image's layers take in one snapshotter: bytes on disk, inodes, and how many snapshots that is."""

    snapshotter: str
    size: int
    inodes: int
    snapshots: int


class ImageUsage(Message):
    name: str
    size: int
    """Bytes of its blobs that are here, and (`unique`) of those that no other image of the namespace leads to."""
    unique: int
    blobs: int
    snapshots: list[SnapshotterUsage] = []


class ImagesUsage(Message):
    """Images, and all of them together: what they share counts once."""

    images: list[ImageUsage]
    size: int
    blobs: int
    snapshots: list[SnapshotterUsage] = []


class UnpackImage(Request):
    name: str = Field(min_length=1, max_length=4096)
    platform: str = ""
    snapshotter: str = "overlayfs"


class UnpackProgress(Message):
    layers_done: int = 0
    layers_total: int = 0


class UnpackedImage(Message):
    image: Image
    chain_id: str
    """The key of the snapshot of all its layers; empty for an image without any."""


IMAGE_TAG = Verb(
    "content",
    "image",
    "tag",
    TagImage,
    Image,
    mutates=True,
    behaviour=behaves("Gives an image a further name.", "NOT_FOUND", "ALREADY_EXISTS"),
)
IMAGE_CHECK = Verb(
    "content",
    "image",
    "check",
    CheckImage,
    ImageCheck,
    behaviour=behaves("What of an image is here, for each of its platforms.", "NOT_FOUND"),
)
IMAGE_USAGE = Verb(
    "content",
    "image",
    "usage",
    ImagesUsageRequest,
    ImagesUsage,
    behaviour=behaves("What images take: their blobs, and their snapshots.", "NOT_FOUND"),
)
IMAGE_UNPACK = OperationVerb(
    "content",
    "image",
    "unpack",
    UnpackImage,
    UnpackedImage,
    UnpackProgress,
    quiet_seconds=0.1,
    behaviour=behaves(
        "Unpacks an image whose blobs are here.", "NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"
    ),
)
