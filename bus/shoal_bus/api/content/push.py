"""Images from this node to a registry."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shoal_bus.api.content.registry import RegistryAccess
from shoal_bus.message import Message
from shoal_bus.types import Descriptor, Digest
from shoal_bus.verb import OperationVerb, behaves


class PushImage(RegistryAccess):
    """A push of image `name` to `destination`, a reference; empty: to where its name says.

    Of an index, one platform's manifest is pushed (`platform`; empty: this node's own), or with `all_platforms` all of
    it, whatever of it the registry doesn't have yet. Anything else is pushed as it is.
    """

    name: str = Field(min_length=1, max_length=4096)
    destination: str = Field(default="", max_length=4096)
    platform: str = ""
    all_platforms: bool = False
    max_concurrent_uploads: int = Field(default=3, ge=1, le=32)


class PushedImage(Message):
    """What is in the registry now: `name` is the whole reference, `target` what it names there."""

    name: str
    target: Descriptor


class BlobProgress(Message):
    digest: Digest
    size: int
    offset: int = 0
    """Bytes that have been sent."""
    state: Literal["waiting", "uploading", "done", "exists", "mounted", "skipped"] = "waiting"
    """`exists`: the registry had it; `mounted`: it had it in another repository; `skipped`: it may not be handed on."""


class PushProgress(Message):
    state: Literal["preparing", "pushing", "naming", "done"] = "preparing"
    """`naming`: all blobs are there, and the manifests follow."""
    name: str = ""
    blobs: list[BlobProgress] = []
    bytes_done: int = 0
    """Of `bytes_total`, those that the registry has, sent or not."""
    bytes_total: int = 0
    rate: float = 0.0
    """Bytes a second, as they were sent during the last seconds."""
    waiting: str = ""
    """What the registry has us wait for; empty while it doesn't."""


IMAGE_PUSH = OperationVerb(
    "content",
    "image",
    "push",
    PushImage,
    PushedImage,
    PushProgress,
    quiet_seconds=0.1,
    tells_all=True,
    behaviour=behaves(
        "Pushes an image to a registry: the blobs it doesn't have, then the manifests.",
        "NOT_FOUND",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "DATA_LOSS",
        "FAILED_PRECONDITION",
        "UNAVAILABLE",
    ),
)
