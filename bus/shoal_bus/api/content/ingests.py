"""Ingests: blobs in the making."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from shoal_bus.api.content.blobs import ListBlobs
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Digest, Labels
from shoal_bus.verb import StreamVerb, Verb, behaves

REF = Field(min_length=1, max_length=512)
SESSION = Field(default="", max_length=64)


class IngestRequest(Request):
    ref: str = REF


class OpenIngest(Request):
    """Begins an ingest, or finds one that was begun, to write to it under `session`: any text of the writer's own.

    As long as that writer goes on (each request holds the ingest for half a minute), a writer under another session, or
    under none, is told UNAVAILABLE. ALREADY_EXISTS when the namespace has the blob `expected`.

    What was announced before must be announced again, or not at all. A writer who is to `overrule` it isn't held to
    that: an ingest of another `total` starts over, and of what is `expected` nothing is remembered.

    With a `claim`, the reply has the file itself for a writer on this node. He holds an exclusive lock on it (flock(2))
    before he writes and until he has written, appends to it, says how far he is by `advance`, and commits by a write.
    Nobody else writes to it, or makes a blob of it, while it is locked.
    """

    ref: str = REF
    session: str = Field(min_length=1, max_length=64)
    total: int = Field(default=0, ge=0)
    expected: Digest | None = None
    labels: Labels = {}
    overrule: bool = False
    claim: bool = False


class WriteIngest(Request):
    """Bytes of a blob in the making. They must start where the ingest ends, or the reply is OUT_OF_RANGE.

    What is there already may be sent again if it is the same. With `truncate` what is there is dropped first, and
    `offset` is 0. More bytes than `total` are FAILED_PRECONDITION at once. `commit` ends it: size and digest are
    compared with `total` and `expected` where those are given. One that is to `overrule` is held to what this very
    request announces, and to nothing that was announced before.
    """

    ref: str = REF
    offset: int = Field(default=0, ge=0)
    data: bytes = b""
    truncate: bool = False
    total: int = Field(default=0, ge=0)
    expected: Digest | None = None
    commit: bool = False
    labels: Labels = {}
    overrule: bool = False
    session: str = SESSION
    """The one it was opened under, if it was."""


class AdvanceIngest(Request):
    """A writer to the file itself has written it up to `offset`, and goes on."""

    ref: str = REF
    session: str = Field(min_length=1, max_length=64)
    offset: int = Field(ge=0)


class ReleaseIngest(Request):
    """A writer is done for now: the ingest stays, and another one may write to it."""

    ref: str = REF
    session: str = Field(min_length=1, max_length=64)


class IngestStatus(Message):
    ref: str
    offset: int
    total: int = 0
    expected: str = ""
    labels: Labels = {}
    started_at: datetime
    updated_at: datetime
    digest: str = ""
    """Of the bytes so far, told to a writer who opens it or is to overrule: as `expected` is, or else by sha256."""
    path: str = ""
    """Its file on this node, told to a writer who claims it."""
    committed: Digest | None = None
    """The digest, once it is a blob."""


INGEST_OPEN = Verb(
    "content",
    "ingest",
    "open",
    OpenIngest,
    IngestStatus,
    mutates=True,
    behaviour=behaves(
        "Begins a blob in the making, or goes on with one, as its only writer.",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
    ),
)
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
    ),
)
INGEST_ADVANCE = Verb(
    "content",
    "ingest",
    "advance",
    AdvanceIngest,
    Empty,
    behaviour=behaves("Has what was written to an ingest's file hashed, and others kept off.", "NOT_FOUND"),
)
INGEST_RELEASE = Verb(
    "content",
    "ingest",
    "release",
    ReleaseIngest,
    Empty,
    mutates=True,
    behaviour=behaves("Lets others write to an ingest.", "NOT_FOUND"),
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
    behaviour=behaves("Drops an ingest and its bytes.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
