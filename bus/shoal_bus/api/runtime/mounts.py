"""Mounts that the node makes and keeps for its clients: containerd's mount manager.

A `Mount` list may need more than mount(2): a type `loop` (a file as a block device), or transforms before the type.
Activating it makes, in the host's mount namespace, what has to be there first, and answers with what is left to be
mounted by whoever uses it: the system mounts.

| transform | what it does |
| --- | --- |
| `format/` | fills in `{{ mount N }}`, `{{ source N }}`, `{{ target N }}` (of the active mount N, from 0) and `{{ overlay A B }}` (the mount points from A to B, by colons) in source, target and options |
| `mkdir/` | makes the directories of its options `X-containerd.mkdir.path=<path>[:<mode>[:<uid>:<gid>]]` |
| `mkfs/` | makes its source a file with a file system: `X-containerd.mkfs.size=<bytes or 64MiB>`, `.fs=<ext2, ext3, ext4 or xfs>`, `.uuid=<UUID>`; one that is there stays |

Several may stand before a type (`format/mkdir/overlay`); `format` is done first. Directories and files are made below
the node's root and state directory alone.
"""  # noqa: E501

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Filter, Labels, Mount
from shoal_bus.verb import StreamVerb, Verb, behaves

MOST_MOUNTS = 255
"""In one list, as with containerd."""


class ActiveMount(Message):
    """A mount that is made: as it was mounted, its transforms done, and where; of a `loop` that is a link to a device.

    `data` is what its kind has to say besides: `device` of a loop.
    """

    mount: Mount
    mounted_at: datetime
    mount_point: str
    data: Labels = {}


class Activation(Message):
    """A list that is activated. `system` is what is left to be mounted, in order."""

    name: str
    active: list[ActiveMount] = []
    system: list[Mount] = []
    labels: Labels = {}
    lease: str = ""
    """What it goes with, unless its labels hold it."""
    created_at: datetime
    updated_at: datetime


class MountRequest(Request):
    name: str = Field(min_length=1, max_length=1024)


class ActivateMounts(MountRequest):
    """`temporary`: everything is mounted, and what is left is a bind mount of the last. `allow_mount_types` are left to
    the caller: types (`loop`, `format/ext4`), or all with a transform (`format/*`), unless a later mount needs them.
    """

    mounts: list[Mount] = Field(max_length=MOST_MOUNTS)
    labels: Labels = {}
    temporary: bool = False
    allow_mount_types: list[str] = []


class UpdateMount(MountRequest):
    """`fields`: `labels`, or `labels.<key>`; none is all labels. A label without a value is removed."""

    labels: Labels = {}
    fields: list[str] = []


class ListMounts(Filter, Request):
    """Filters see `name` and `labels`."""


MOUNT_ACTIVATE = Verb(
    "runtime",
    "mount",
    "activate",
    ActivateMounts,
    Activation,
    mutates=True,
    behaviour=behaves(
        "Mounts what of a list needs the node for it; UNIMPLEMENTED: nothing does, mount it as it is.",
        "ALREADY_EXISTS", "FAILED_PRECONDITION", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED",
    ),
)  # fmt: skip
MOUNT_DEACTIVATE = Verb(
    "runtime",
    "mount",
    "deactivate",
    MountRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Takes away what an activation has mounted, the last one first.", "NOT_FOUND"),
)
MOUNT_INFO = Verb(
    "runtime", "mount", "info", MountRequest, Activation, behaviour=behaves("An activation.", "NOT_FOUND")
)
MOUNT_LIST = StreamVerb(
    "runtime", "mount", "list", ListMounts, Activation, behaviour=behaves("Every activation of the namespace.")
)
MOUNT_UPDATE = Verb(
    "runtime",
    "mount",
    "update",
    UpdateMount,
    Activation,
    mutates=True,
    behaviour=behaves("Changes an activation's labels.", "NOT_FOUND"),
)
