"""Blobs: what they are, their bytes, and claim checks for who is on the node."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Digest, Filter, Labels
from shoal_bus.verb import StreamVerb, Verb, behaves


class BlobRequest(Request):
    digest: Digest


class BlobInfo(Message):
    """A blob as one namespace sees it: bytes are shared between namespaces, labels and the right to see it aren't."""

    digest: Digest
    size: int
    labels: Labels = {}
    created_at: datetime
    updated_at: datetime
    rotten: str = ""
    """What is wrong with its bytes, if anything: they aren't served until it has been fetched or written again."""


class UpdateBlob(Request):
    """`fields` names the labels to change, as `labels.<key>`; empty replaces all. A label without a value goes."""

    digest: Digest
    labels: Labels = {}
    fields: list[str] = []


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
    """`while_seen`: the path goes sooner, as soon as the namespace hasn't the blob any more, or it is damaged: whoever
    finds the path there needn't ask whether he may read."""

    digest: Digest
    ttl_seconds: float = Field(default=60.0, gt=0, le=3600)
    while_seen: bool = False


class Claim(Message):
    """A claim check: a path on this node by which the blob's bytes can be had, and nobody else's.

    They stay there until `expires_at`, whatever becomes of the blob, unless it was claimed `while_seen`. The path can't
    be guessed: who has it may read.
    """

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
    behaviour=behaves("A blob's bytes, or a range of them.", "NOT_FOUND", "OUT_OF_RANGE", "DATA_LOSS"),
)
BLOB_CLAIM = Verb(
    "content",
    "blob",
    "claim",
    ClaimBlob,
    Claim,
    behaviour=behaves(
        "The path of a blob's bytes on this node, which stay there for a while.", "NOT_FOUND", "DATA_LOSS"
    ),
)
BLOB_UPDATE = Verb(
    "content",
    "blob",
    "update",
    UpdateBlob,
    BlobInfo,
    mutates=True,
    behaviour=behaves("Changes a blob's labels.", "NOT_FOUND"),
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
