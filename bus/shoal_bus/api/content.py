"""`services/content`: blobs, ingests, images, namespaces."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from shoal_bus.events import Topic
from shoal_bus.identifiers import Identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Descriptor, Digest, Filter, Labels, Platform
from shoal_bus.verb import OperationVerb, StreamVerb, Verb, behaves

# ---------------------------------------------------------------------------------------------------------------- blobs


class BlobRequest(Request):
    digest: Digest


class BlobInfo(Message):
    """A blob as one namespace sees it: bytes are shared between namespaces, labels and the right to see it aren't."""

    digest: Digest
    size: int
    labels: Labels = {}
    created_at: datetime
    updated_at: datetime


class ListBlobs(Filter, Request):
    pass


class ReadBlob(Request):
    """A range of a blob; `size` 0 reads to its end."""

    digest: Digest
    offset: int = Field(default=0, ge=0)
    size: int = Field(default=0, ge=0)


class Chunk(Message):
    offset: int
    data: bytes


class ClaimBlob(Request):
    digest: Digest
    ttl_seconds: float = Field(default=60.0, gt=0, le=3600)


class Claim(Message):
    """A claim check: where the blob lies on this node. It isn't removed before `expires_at`."""

    digest: Digest
    path: str
    size: int
    expires_at: datetime


BLOB_INFO = Verb(
    "content", "blob", "info", BlobRequest, BlobInfo, behaviour=behaves("What is known of a blob.", "NOT_FOUND")
)
BLOB_LIST = StreamVerb(
    "content", "blob", "list", ListBlobs, BlobInfo, behaviour=behaves("Every blob of the namespace.")
)
BLOB_READ = StreamVerb(
    "content",
    "blob",
    "read",
    ReadBlob,
    Chunk,
    behaviour=behaves("A blob's bytes, or a range of them.", "NOT_FOUND", "OUT_OF_RANGE"),
)
BLOB_CLAIM = Verb(
    "content",
    "blob",
    "claim",
    ClaimBlob,
    Claim,
    behaviour=behaves("The path of a blob on this node, under a temporary lease taken with it.", "NOT_FOUND"),
)
BLOB_DELETE = Verb(
    "content",
    "blob",
    "delete",
    BlobRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Removes a blob from the namespace.", "NOT_FOUND", "FAILED_PRECONDITION"),
)

# -------------------------------------------------------------------------------------------------------------- ingests


class IngestRequest(Request):
    ref: str = Field(min_length=1, max_length=512)


class WriteIngest(Request):
    """Bytes of a blob in the making. They must start where the ingest ends, or the reply is OUT_OF_RANGE.

    `commit` ends it: size and digest are compared with `total` and `expected` where those are given.
    """

    ref: str = Field(min_length=1, max_length=512)
    offset: int = Field(default=0, ge=0)
    data: bytes = b""
    total: int = Field(default=0, ge=0)
    expected: Digest | None = None
    commit: bool = False
    labels: Labels = {}


class IngestStatus(Message):
    ref: str
    offset: int
    total: int = 0
    expected: str = ""
    started_at: datetime
    updated_at: datetime
    committed: Digest | None = None
    """The digest, once it is a blob."""


INGEST_WRITE = Verb(
    "content",
    "ingest",
    "write",
    WriteIngest,
    IngestStatus,
    mutates=True,
    behaviour=behaves(
        "Appends to a blob in the making, and commits it where asked.",
        "ALREADY_EXISTS",
        "OUT_OF_RANGE",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
    ),
)
INGEST_STATUS = Verb(
    "content", "ingest", "status", IngestRequest, IngestStatus, behaviour=behaves("How far an ingest is.", "NOT_FOUND")
)
INGEST_LIST = StreamVerb(
    "content", "ingest", "list", ListBlobs, IngestStatus, behaviour=behaves("Every ingest of the namespace.")
)
INGEST_ABORT = Verb(
    "content",
    "ingest",
    "abort",
    IngestRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Drops an ingest and its bytes.", "NOT_FOUND"),
)

# --------------------------------------------------------------------------------------------------------------- images


class ImageRequest(Request):
    name: str = Field(min_length=1, max_length=4096)


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
    name: str = Field(min_length=1, max_length=4096)
    target: Descriptor
    labels: Labels = {}


class UpdateImage(Request):
    """`fields` names what to change: `target`, `labels`, or `labels.<key>`; empty changes all."""

    name: str = Field(min_length=1, max_length=4096)
    target: Descriptor | None = None
    labels: Labels = {}
    fields: list[str] = []


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


class PullImage(Request):
    """A pull. `name` is a reference; a short one gets Docker's defaults (`docker.io/library/busybox:latest`)."""

    name: str = Field(min_length=1, max_length=4096)
    platform: str = ""
    snapshotter: str = "overlayfs"
    """Where the layers are unpacked to; empty only fetches."""
    plain_http: bool = False
    """Speak HTTP without TLS; loopback registries are spoken to so by themselves."""
    labels: Labels = {}
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
    ImageRequest,
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
IMAGE_PULL = OperationVerb(
    "content",
    "image",
    "pull",
    PullImage,
    Image,
    PullProgress,
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

# ----------------------------------------------------------------------------------------------------------- namespaces


class Namespace(Message):
    name: str
    labels: Labels = {}


class NamespaceRequest(Request):
    name: Identifier


class SaveNamespace(Request):
    """`fields` (update only) names the labels to change, as `labels.<key>`; empty replaces all."""

    name: Identifier
    labels: Labels = {}
    fields: list[str] = []


class ListNamespaces(Request):
    pass


NAMESPACE_GET = Verb(
    "content",
    "namespace",
    "get",
    NamespaceRequest,
    Namespace,
    behaviour=behaves("A namespace.", "NOT_FOUND", whole_node=True),
)
NAMESPACE_LIST = StreamVerb(
    "content",
    "namespace",
    "list",
    ListNamespaces,
    Namespace,
    behaviour=behaves("Every namespace of the node.", whole_node=True),
)
NAMESPACE_CREATE = Verb(
    "content",
    "namespace",
    "create",
    SaveNamespace,
    Namespace,
    mutates=True,
    behaviour=behaves("Makes a namespace.", "ALREADY_EXISTS", whole_node=True),
)
NAMESPACE_UPDATE = Verb(
    "content",
    "namespace",
    "update",
    SaveNamespace,
    Namespace,
    mutates=True,
    behaviour=behaves("Changes a namespace's labels.", "NOT_FOUND", whole_node=True),
)
NAMESPACE_DELETE = Verb(
    "content",
    "namespace",
    "delete",
    NamespaceRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Removes an empty namespace.", "NOT_FOUND", "FAILED_PRECONDITION", whole_node=True),
)

# --------------------------------------------------------------------------------------------------------------- events


class ImageEvent(Message):
    """Payload of `/images/create` and `/images/update`."""

    name: str
    labels: Labels = {}


class ImageDeleted(Message):
    name: str


class ContentEvent(Message):
    """Payload of `/content/create`."""

    digest: str
    size: int


class ContentDeleted(Message):
    digest: str


class NamespaceEvent(Message):
    name: str
    labels: Labels = {}


class NamespaceDeleted(Message):
    name: str


IMAGES_CREATE = Topic("content", "/images/create", ImageEvent, "name")
IMAGES_UPDATE = Topic("content", "/images/update", ImageEvent, "name")
IMAGES_DELETE = Topic("content", "/images/delete", ImageDeleted, "name")
CONTENT_CREATE = Topic("content", "/content/create", ContentEvent, "digest")
CONTENT_DELETE = Topic("content", "/content/delete", ContentDeleted, "digest")
NAMESPACES_CREATE = Topic("content", "/namespaces/create", NamespaceEvent, "name")
NAMESPACES_UPDATE = Topic("content", "/namespaces/update", NamespaceEvent, "name")
NAMESPACES_DELETE = Topic("content", "/namespaces/delete", NamespaceDeleted, "name")
