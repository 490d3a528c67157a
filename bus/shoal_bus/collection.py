"""Garbage collection, as every service that takes part in it needs it: containerd's labels, and an epoch's requests.

A collection is a mark and a sweep over three databases. The content service leads it. Its steps, each of which makes
the next one safe:

1. An epoch is opened: in content first, then in snapshot and runtime, each by a transaction, under a token that names
   this one collection. From then on content and runtime keep what stops being a root, and snapshot stamps whatever is
   made, changed or looked at. Whoever writes a reference writes it before he makes or looks at what it names.
2. Runtime and snapshot tell what they refer to.
3. Content marks what its images and leases and those references lead to, and sweeps its own rows in that transaction.
4. Snapshot offers what nobody lies on and nobody has stamped; what wasn't marked is swept, checked again there. So are
   mounts that runtime has made for clients, before the snapshots that they may be of.
5. The epoch is closed. A collection that ends anywhere before leaves an open epoch, which the next one replaces.

A reference that was written before the epoch was opened where it is written is seen by the mark; one written later is
to something that was a root within the epoch, or has been stamped since.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from shoal_bus.message import Message, Request
from shoal_bus.types import Labels

ROOT = "containerd.io/gc.root"
EXPIRE = "containerd.io/gc.expire"
"""RFC 3339. A lease or an image is nobody's any more from then on; anything else is a root until then."""
FLAT = "containerd.io/gc.flat"
"""Of a lease: it holds what it names, and not what that leads to."""
REFERENCE = "containerd.io/gc.ref."
BACK_REFERENCE = "containerd.io/gc.bref."
PREFIX = "containerd.io/gc."


class Epoch(Request):
    """Names a collection."""

    token: str


class Opened(Message):
    """`snapshotters`: those the answer is for; what belongs to others is theirs to offer."""

    snapshotters: list[str] = []


class Holder(Message):
    """A container, or what will be one: the snapshots it needs, as (snapshotter, key), and the labels that matter."""

    namespace: str
    id: str
    snapshots: list[tuple[str, str]] = []
    labels: Labels = {}


class LabelledSnapshot(Message):
    """A snapshot with labels for collection. `held`: it stays, whatever refers to it."""

    namespace: str
    snapshotter: str
    key: str
    labels: Labels
    held: bool


class Candidate(Message):
    """A snapshot that nothing lies on, and those below it that would then be so too, one after another."""

    namespace: str
    snapshotter: str
    keys: list[str]


class Sweep(Request):
    """Snapshots to be removed in this order, each only if it may be."""

    token: str
    namespace: str
    snapshotter: str
    keys: list[str]


class Swept(Message):
    """The keys of those that were removed."""

    keys: list[str] = []


def of_collection(labels: Mapping[str, str]) -> Labels:
    """The labels that garbage collection heeds."""
    return {key: value for key, value in labels.items() if key.startswith(PREFIX)}


def expiry(labels: Mapping[str, str]) -> float | None:
    """When something labelled so expires, in seconds since 1970; None for never, and for what is no time."""
    text = labels.get(EXPIRE)
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


def is_root(labels: Mapping[str, str], now: float) -> bool:
    """Whether a blob or a snapshot labelled so stays by itself."""
    expires = expiry(labels)
    return any(key.startswith(ROOT) for key in labels) or (expires is not None and expires > now)
