"""Images between this node and elsewhere."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shoal_bus.api.content.images import Image
from shoal_bus.api.content.registry import RegistryAccess
from shoal_bus.message import Message
from shoal_bus.types import Digest, Labels
from shoal_bus.verb import OperationVerb, behaves


class PullImage(RegistryAccess):
    """A pull. `name` is a reference; a short one gets Docker's defaults (`docker.io/library/busybox:latest`)."""

    name: str = Field(min_length=1, max_length=4096)
    platform: str = ""
    all_platforms: bool = False
    """Also fetch what an index has for other platforms; unpacked is the one for `platform`, or for this node."""
    platforms: list[str] = Field(default=[], max_length=1024)
    """Also fetch what an index has for exactly these; without a `platform`, unpacked is the first one that there is."""
    all_metadata: bool = False
    """Also fetch an index's other manifests and their configurations, without layers."""
    snapshotter: str = "overlayfs"
    """Where the layers are unpacked to; empty only fetches."""
    labels: Labels = {}
    save_as: str = Field(default="", max_length=4096)
    """The image's name here, as it is; empty: the reference's."""
    max_concurrent_downloads: int = Field(default=3, ge=1, le=32)


class LayerProgress(Message):
    digest: Digest
    size: int
    offset: int = 0
    """Bytes that have arrived."""
    state: Literal["waiting", "downloading", "downloaded", "extracting", "done", "exists"] = "waiting"


class PullProgress(Message):
    state: Literal["resolving", "fetching", "unpacking", "done"] = "resolving"
    name: str = ""
    layers: list[LayerProgress] = []
    bytes_done: int = 0
    bytes_total: int = 0
    rate: float = 0.0
    """Bytes a second, as they came during the last seconds."""
    waiting: str = ""
    """What the registry has us wait for; empty while it doesn't."""


IMAGE_PULL = OperationVerb(
    "content",
    "image",
    "pull",
    PullImage,
    Image,
    PullProgress,
    quiet_seconds=0.1,
    tells_all=True,
    behaviour=behaves(
        "Fetches an image from its registry, verifies and unpacks it.",
        "NOT_FOUND",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "DATA_LOSS",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
    ),
)
