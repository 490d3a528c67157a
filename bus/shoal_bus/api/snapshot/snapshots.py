"""Snapshots and their mounts."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Filter, Labels, Mount
from shoal_bus.verb import StreamVerb, Verb, behaves

DEFAULT = "overlayfs"

Kind = Literal["active", "view", "committed"]
KEY = Field(min_length=1, max_length=1024)


class SnapshotRequest(Request):
    key: str = KEY


class PrepareSnapshot(Request):
    """An active (or, by `view`, read-only) snapshot `key` on top of the committed one `parent`; empty for none."""

    key: str = KEY
    parent: str = ""
    labels: Labels = {}


class CommitSnapshot(Request):
    """The active snapshot `key` becomes the committed `name`.

    `parent` is laid under one that was prepared without any, where its snapshotter is `parallel`; one that has a parent
    keeps it.
    """

    name: str = KEY
    key: str = KEY
    labels: Labels = {}
    parent: str = ""


class UpdateSnapshot(Request):
    """`fields` names the labels to change, as `labels.<key>`; empty replaces all."""

    key: str = KEY
    labels: Labels = {}
    fields: list[str] = []


class ListSnapshots(Filter, Request):
    pass


class Mounts(Message):
    mounts: list[Mount]


class SnapshotInfo(Message):
    key: str
    parent: str = ""
    kind: Kind
    labels: Labels = {}
    created_at: datetime
    updated_at: datetime


class Usage(Message):
    """What a snapshot alone takes, without its parents: bytes on disk and inodes."""

    size: int
    inodes: int


SNAPSHOT_PREPARE = Verb(
    "snapshot",
    DEFAULT,
    "prepare",
    PrepareSnapshot,
    Mounts,
    mutates=True,
    behaviour=behaves("An active snapshot, and how to mount it.", "NOT_FOUND", "ALREADY_EXISTS"),
)
SNAPSHOT_VIEW = Verb(
    "snapshot",
    DEFAULT,
    "view",
    PrepareSnapshot,
    Mounts,
    mutates=True,
    behaviour=behaves("A read-only snapshot, and how to mount it.", "NOT_FOUND", "ALREADY_EXISTS"),
)
SNAPSHOT_COMMIT = Verb(
    "snapshot",
    DEFAULT,
    "commit",
    CommitSnapshot,
    SnapshotInfo,
    mutates=True,
    behaviour=behaves(
        "An active snapshot becomes a committed one.", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"
    ),
)
SNAPSHOT_MOUNTS = Verb(
    "snapshot",
    DEFAULT,
    "mounts",
    SnapshotRequest,
    Mounts,
    behaviour=behaves("How to mount an active snapshot or a view.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
SNAPSHOT_STAT = Verb(
    "snapshot", DEFAULT, "stat", SnapshotRequest, SnapshotInfo, behaviour=behaves("A snapshot's record.", "NOT_FOUND")
)
SNAPSHOT_UPDATE = Verb(
    "snapshot",
    DEFAULT,
    "update",
    UpdateSnapshot,
    SnapshotInfo,
    mutates=True,
    behaviour=behaves("Changes a snapshot's labels.", "NOT_FOUND"),
)
SNAPSHOT_LIST = StreamVerb(
    "snapshot", DEFAULT, "list", ListSnapshots, SnapshotInfo, behaviour=behaves("Every snapshot of the namespace.")
)
SNAPSHOT_USAGE = Verb(
    "snapshot", DEFAULT, "usage", SnapshotRequest, Usage, behaviour=behaves("What a snapshot alone takes.", "NOT_FOUND")
)
SNAPSHOT_REMOVE = Verb(
    "snapshot",
    DEFAULT,
    "remove",
    SnapshotRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Removes a snapshot and its files.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
