"""Leases: what holds blobs, snapshots, ingests and images that nothing else refers to yet."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Filter, Labels, check_digest
from shoal_bus.verb import StreamVerb, Verb, behaves
from shoal_bus.wire import LONGEST_LEASE

_SNAPSHOTS = re.compile(r"snapshots/[A-Za-z0-9][A-Za-z0-9._-]{0,75}")


def _lease_id(value: str) -> str:
    if not value.isprintable():
        raise ValueError("a lease's id must be printable")
    return value


def _resource_type(value: str) -> str:
    if value not in ("content", "ingests", "images") and not _SNAPSHOTS.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is no type of resource: content, images, ingests or snapshots/<snapshotter>")
    return value


LeaseId = Annotated[str, AfterValidator(_lease_id)]
ResourceType = Annotated[str, AfterValidator(_resource_type)]
_ID = Field(min_length=1, max_length=LONGEST_LEASE)


class Lease(Message):
    """A lease. Its label `containerd.io/gc.expire` (RFC 3339) ends it, by the service's clock."""

    id: str
    created_at: datetime
    labels: Labels = {}


class CreateLease(Request):
    """`id` empty: one is made up."""

    id: LeaseId = Field(default="", max_length=LONGEST_LEASE)
    labels: Labels = {}


class LeaseRequest(Request):
    id: LeaseId = _ID


class DeleteLease(Request):
    """`sync`: what only this lease held is gone when the reply comes."""

    id: LeaseId = _ID
    sync: bool = False


class ListLeases(Filter, Request):
    pass


class LeaseResource(Message):
    """What a lease holds: a blob by its digest, an image by its name, a snapshot by its key, an ingest by its ref."""

    type: ResourceType
    id: str = Field(min_length=1, max_length=4096)


class ChangeLease(Request):
    """What is added to a lease, or taken from it. It needn't be there (yet)."""

    lease: LeaseId = _ID
    type: ResourceType
    id: str = Field(min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _blobs_have_digests(self) -> Self:
        if self.type == "content":
            check_digest(self.id)
        return self


LEASE_CREATE = Verb(
    "content",
    "lease",
    "create",
    CreateLease,
    Lease,
    mutates=True,
    behaviour=behaves("Makes a lease.", "ALREADY_EXISTS"),
)
LEASE_DELETE = Verb(
    "content",
    "lease",
    "delete",
    DeleteLease,
    Empty,
    mutates=True,
    behaviour=behaves("Ends a lease: what nothing else holds is collected.", "NOT_FOUND"),
)
LEASE_GET = Verb("content", "lease", "get", LeaseRequest, Lease, behaviour=behaves("A lease.", "NOT_FOUND"))
LEASE_LIST = StreamVerb(
    "content", "lease", "list", ListLeases, Lease, behaviour=behaves("Every lease of the namespace.")
)
LEASE_ADD = Verb(
    "content",
    "lease",
    "add",
    ChangeLease,
    Empty,
    mutates=True,
    behaviour=behaves("Adds a resource to a lease.", "NOT_FOUND"),
)
LEASE_REMOVE = Verb(
    "content",
    "lease",
    "remove",
    ChangeLease,
    Empty,
    mutates=True,
    behaviour=behaves("Takes a resource from a lease.", "NOT_FOUND"),
)
LEASE_RESOURCES = StreamVerb(
    "content",
    "lease",
    "resources",
    LeaseRequest,
    LeaseResource,
    behaviour=behaves("Everything a lease holds by name.", "NOT_FOUND"),
)
