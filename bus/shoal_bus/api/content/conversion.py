"""Images made of other images: the same files, in another form."""

from __future__ import annotations

from pydantic import Field

from shoal_bus.api.content.images import Image
from shoal_bus.message import Message, Request
from shoal_bus.types import Compression, Labels
from shoal_bus.verb import OperationVerb, behaves


class ConvertImage(Request):
    """The image `source` as the image `name`, its layers compressed anew, or its documents rewritten with OCI's types.

    Layers that are as they should be already stay as they are, and diff IDs always do. Of an index those for `platform`
    (empty: this node's own) are converted, or all; attestations, which are of other bytes, are left out.
    """

    source: str = Field(min_length=1, max_length=4096)
    name: str = Field(min_length=1, max_length=4096)
    compression: Compression | None = None
    oci: bool = False
    platform: str = ""
    all_platforms: bool = False
    snapshotter: str = "overlayfs"
    """Where the layers are unpacked to, if they aren't; empty leaves it."""
    labels: Labels = {}


class ConvertProgress(Message):
    layers_done: int = 0
    layers_total: int = 0
    bytes_done: int = 0
    bytes_total: int = 0


IMAGE_CONVERT = OperationVerb(
    "content",
    "image",
    "convert",
    ConvertImage,
    Image,
    ConvertProgress,
    quiet_seconds=0.1,
    tells_all=True,
    behaviour=behaves(
        "Makes an image of another one: other compression, other media types.",
        "NOT_FOUND",
        "DATA_LOSS",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
    ),
)
