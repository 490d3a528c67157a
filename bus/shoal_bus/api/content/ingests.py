"""Ingests: blobs in the making."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from shoal_bus.api.content.blobs import ListBlobs
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Digest, Labels
from shoal_bus.verb import StreamVerb, Verb, behaves


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
