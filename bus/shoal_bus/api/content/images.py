"""Image records, and what an image is for one platform."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Descriptor, Digest, Filter, Labels, Platform
from shoal_bus.verb import StreamVerb, Verb, behaves


class ImageRequest(Request):
    name: str = Field(min_length=1, max_length=4096)


class DeleteImage(ImageRequest):
    """`sync`: what only this image needed is gone when the reply comes; else it goes a little later.

    With a `target`, the name is removed only while it stands for that digest: else it is NOT_FOUND.
    """

    sync: bool = True
    target: Digest | None = None


class Image(Message):
    """An image record: a name for a descriptor."""

    name: str
    target: Descriptor
    labels: Labels = {}
    created_at: datetime
    updated_at: datetime


class ListImages(Filter, Request):
    pass


class CreateImage(Request):
    """`created_at` is instead of now."""

    name: str = Field(min_length=1, max_length=4096)
    target: Descriptor
    labels: Labels = {}
    created_at: datetime | None = None


class UpdateImage(Request):
    """`fields` names what to change: `target`, `labels`, or `labels.<key>`; empty changes all of these.

    `annotations` and `annotations.<key>` are of the target. `updated_at` is instead of now.
    """

    name: str = Field(min_length=1, max_length=4096)
    target: Descriptor | None = None
    labels: Labels = {}
    annotations: Labels = {}
    fields: list[str] = []
    updated_at: datetime | None = None


class ResolveImage(Request):
    """`platform` as `os/architecture[/variant]`; empty means this node's own."""

    name: str = Field(min_length=1, max_length=4096)
    platform: str = ""


class ResolvedImage(Message):
    """An image for one platform, as whoever runs it needs it: its configuration, and what its layers unpack to."""

    image: Image
    manifest: Descriptor
    config_descriptor: Descriptor
    layers: list[Descriptor]
    diff_ids: list[Digest]
    chain_id: str
    """The key of the committed snapshot of all layers (OCI image-spec, config.md#layer-chainid); empty for none."""
    platform: Platform
    config: dict[str, Any]
    """The image configuration as JSON has it: `config.Env`, `config.Entrypoint`, …"""
    size: int
    """Manifest, configuration and layers, in bytes as stored."""


IMAGE_GET = Verb("content", "image", "get", ImageRequest, Image, behaviour=behaves("An image record.", "NOT_FOUND"))
IMAGE_LIST = StreamVerb(
    "content", "image", "list", ListImages, Image, behaviour=behaves("Every image record of the namespace.")
)
IMAGE_CREATE = Verb(
    "content",
    "image",
    "create",
    CreateImage,
    Image,
    mutates=True,
    behaviour=behaves("Makes an image record.", "ALREADY_EXISTS"),
)
IMAGE_UPDATE = Verb(
    "content",
    "image",
    "update",
    UpdateImage,
    Image,
    mutates=True,
    behaviour=behaves("Changes an image record.", "NOT_FOUND"),
)
IMAGE_DELETE = Verb(
    "content",
    "image",
    "delete",
    DeleteImage,
    Empty,
    mutates=True,
    behaviour=behaves("Removes an image record, and the blobs and snapshots that nothing else needs.", "NOT_FOUND"),
)
IMAGE_RESOLVE = Verb(
    "content",
    "image",
    "resolve",
    ResolveImage,
    ResolvedImage,
    behaviour=behaves(
        "An image's manifest, configuration and chain ID for one platform.", "NOT_FOUND", "FAILED_PRECONDITION"
    ),
)
