"""Scrubbing: blobs' bytes are read and compared with their digests."""

from __future__ import annotations

from shoal_bus.message import Message, Request
from shoal_bus.types import Digest
from shoal_bus.verb import OperationVerb, behaves


class ScrubBlobs(Request):
    """The blobs to check; none means all that the namespace sees."""

    digests: list[Digest] = []


class RottenBlob(Message):
    """A blob whose bytes aren't what its digest says. They are kept aside, and not served."""

    digest: Digest
    size: int
    problem: str


class ScrubReport(Message):
    """`blobs` and `bytes` were read; `rotten` are those found damaged, now or before."""

    blobs: int = 0
    bytes: int = 0
    rotten: list[RottenBlob] = []


class ScrubProgress(Message):
    blobs_done: int = 0
    blobs_total: int = 0
    bytes_done: int = 0
    bytes_total: int = 0


BLOB_SCRUB = OperationVerb(
    "content",
    "blob",
    "scrub",
    ScrubBlobs,
    ScrubReport,
    ScrubProgress,
    quiet_seconds=0.5,
    behaviour=behaves("Reads blobs and compares them with their digests; sets damaged ones aside.", "NOT_FOUND"),
)
