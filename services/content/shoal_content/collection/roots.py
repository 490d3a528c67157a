"""The mark: what images, leases, containers and labels lead to.

Roots are images that haven't expired, what living leases and pulls hold, ingests, containers, and blobs and snapshots
labelled as roots. From there it goes on along containerd's labels: `gc.ref.content`, `gc.ref.image`, `gc.ref.mount` and
`gc.ref.snapshot.<snapshotter>`, with anything after `.` or `/`, and against the direction of `gc.bref.*`, by which a
thing says itself what it is to last as long as. A document that isn't labelled so leads to what it refers to by its own
words, whatever type others claim for it (OCI image-spec, manifest.md and image-index.md).

Everything is read from the database: a mark opens no files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shoal_bus.api.runtime import CollectibleMount
from shoal_bus.collection import BACK_REFERENCE, FLAT, REFERENCE, Holder, LabelledSnapshot, expiry, is_root
from shoal_bus.types import Labels

from shoal_content.labels import load

INGEST_SECONDS = 86_400.0
"""How long a client's ingest that nobody writes to, or holds, is waited for (containerd's, too)."""
UNLEASED_SECONDS = 86_400.0
"""How long what was written, or mounted, under no lease stays where nobody asks for a collection."""
MOUNTS = "mounts"
_CONTAINER, _LEASE = "containers", "leases"
Read = Callable[..., Sequence[Any]]


class Node(NamedTuple):
    """Something that is, or is referred to: its type as a lease has it (`content`, `snapshots/overlayfs`), its id."""

    namespace: str
    type: str
    id: str


@dataclass(frozen=True)
class Elsewhere:
    """What other services said: who holds snapshots there, which of these have labels that matter, what is mounted."""

    holders: Sequence[Holder] = ()
    snapshots: Sequence[LabelledSnapshot] = ()
    mounts: Sequence[CollectibleMount] = ()


@dataclass
class Mark:
    """What is reached, and what of this service's own isn't."""

    reached: set[Node] = field(default_factory=set)
    blobs: list[Node] = field(default_factory=list)
    images: list[Node] = field(default_factory=list)
    leases: list[Node] = field(default_factory=list)
    ingests: list[Node] = field(default_factory=list)
    mounts: list[Node] = field(default_factory=list)
    """Of the runtime service's."""
    seen: int = 0
    """The last row of `collection_kept` that was seen."""

    def spare(self, nodes: Set[Node]) -> None:
        """Has some of them not be garbage after all."""
        for kind in (self.blobs, self.images, self.leases, self.ingests, self.mounts):
            kind[:] = [node for node in kind if node not in nodes]

    @property
    def garbage(self) -> list[Node]:
        return [*self.leases, *self.images, *self.ingests, *self.blobs]


def mark(read: Read, elsewhere: Elsewhere, now: float, *, asked: bool = True) -> Mark:
    """Marks everything, as `read` has it; what expires after `now` is alive.

    Unless somebody has `asked` for it, what a client wrote of late under no lease is alive, too: it may be about to say
    what that is for. Containerd seldom collects unasked, and never sooner.
    """
    graph = _Graph()
    found = Mark()
    images = _images(read, graph, now)
    found.leases = _leases(read, graph, now)
    _labelled(read, graph, now)
    _of_others(elsewhere, graph)
    found.seen = _kept(read, graph)
    for one in elsewhere.mounts:
        if not asked and not one.lease and one.created_at.timestamp() > now - UNLEASED_SECONDS:
            graph.root(Node(one.namespace, MOUNTS, one.name))
    if not asked:
        for row in read("SELECT namespace, digest FROM unleased WHERE written_at > ?", (now - UNLEASED_SECONDS,)):
            graph.root(Node(row["namespace"], "content", row["digest"]))
    for row in read("SELECT parent, child FROM blob_references"):
        graph.documents[row["parent"]].append(row["child"])
    ingests = {
        Node(row["namespace"], "ingests", row["ref"]): row
        for row in read("SELECT namespace, ref, expected, pull, updated_at FROM ingests")
    }
    for node, row in ingests.items():
        if row["expected"]:
            graph.references[node].append(Node(node.namespace, "content", row["expected"]))
        if row["pull"] or row["updated_at"] > now - INGEST_SECONDS:
            graph.root(node)
    found.reached = graph.walk()
    found.images = [node for node in images if node not in found.reached]
    found.ingests = [node for node in ingests if node not in found.reached]
    visible = (Node(row[0], "content", row[1]) for row in read("SELECT namespace, digest FROM visible"))
    found.blobs = [node for node in visible if node not in found.reached]
    mounts = (Node(one.namespace, MOUNTS, one.name) for one in elsewhere.mounts)
    found.mounts = [node for node in mounts if node not in found.reached]
    return found


class _Graph:
    def __init__(self) -> None:
        self.references: dict[Node, list[Node]] = defaultdict(list)
        self.documents: dict[str, list[str]] = defaultdict(list)
        """What documents lead to by their own words, in whatever namespace."""
        self.targets: dict[Node, Node] = {}
        """Of images."""
        self._labelled: set[Node] = set()
        """Blobs whose labels say what content they lead to."""
        self._roots: set[Node] = set()
        self._flat: set[Node] = set()

    def root(self, node: Node) -> None:
        self._roots.add(node)

    def flat(self, node: Node) -> None:
        """A root that is held without what it leads to."""
        self._flat.add(node)

    def label(self, node: Node, labels: Labels) -> None:
        """What follows from a node's labels."""
        for target in references(node.namespace, labels):
            self.references[node].append(target)
            if target.type == "content":
                self._labelled.add(node)
        for owner in back_references(node.namespace, labels):
            self.references[owner].append(node)

    def walk(self) -> set[Node]:
        """Everything that roots lead to."""
        reached: set[Node] = set()
        pending = list(self._roots)
        while pending:
            node = pending.pop()
            if node in reached:
                continue
            reached.add(node)
            pending += self._from(node)
        return reached | self._flat

    def _from(self, node: Node) -> Iterator[Node]:
        yield from self.references.get(node, ())
        if node.type == "content" and node not in self._labelled:
            for child in self.documents.get(node.id, ()):
                yield Node(node.namespace, "content", child)


def references(namespace: str, labels: Labels) -> Iterator[Node]:
    """What labels refer to: `gc.ref.content[./…]`, `.image[./…]`, `.mount[./…]`, `.snapshot.<snapshotter>[/…]`."""
    return _targets(namespace, labels, REFERENCE, {"content": "content", "image": "images", "mount": MOUNTS})


def back_references(namespace: str, labels: Labels) -> Iterator[Node]:
    """What labels say that something lasts as long as: `gc.bref.container`, `.content`, `.image`, `.snapshot.…`."""
    kinds = {"content": "content", "image": "images", "container": _CONTAINER}
    return _targets(namespace, labels, BACK_REFERENCE, kinds)


def _targets(namespace: str, labels: Labels, prefix: str, kinds: dict[str, str]) -> Iterator[Node]:
    for key, value in labels.items():
        if not key.startswith(prefix):
            continue
        rest = key.removeprefix(prefix)
        if rest.startswith("snapshot."):
            yield Node(namespace, f"snapshots/{rest.removeprefix('snapshot.').partition('/')[0]}", value)
            continue
        for word, type in kinds.items():
            if rest == word or (rest.startswith(word) and rest[len(word)] in "./"):
                yield Node(namespace, type, value)


# ----------------------------------------------------------------------------------------------------------- the roots


def _images(read: Read, graph: _Graph, now: float) -> list[Node]:
    nodes = []
    for row in read("SELECT namespace, name, target, labels FROM images"):
        node, labels = Node(row["namespace"], "images", row["name"]), load(row["labels"])
        nodes.append(node)
        graph.targets[node] = Node(node.namespace, "content", json.loads(row["target"])["digest"])
        graph.references[node].append(graph.targets[node])
        graph.label(node, labels)
        expires = expiry(labels)
        if expires is None or expires > now:
            graph.root(node)
    return nodes


def _leases(read: Read, graph: _Graph, now: float) -> list[Node]:
    """Roots what living leases and pulls hold; returns the leases that have expired."""
    expired, hold = [], {}
    for row in read("SELECT namespace, id, labels FROM leases"):
        labels = load(row["labels"])
        expires = expiry(labels)
        key = row["namespace"], row["id"]
        if expires is not None and expires <= now:
            expired.append(Node(row["namespace"], _LEASE, row["id"]))
        else:
            hold[key] = graph.flat if FLAT in labels else graph.root
            graph.root(Node(row["namespace"], _LEASE, row["id"]))  # what is mounted under it says so itself
    flat_images = []
    for row in read("SELECT namespace, lease, type, id FROM lease_resources"):
        held = hold.get((row["namespace"], row["lease"]))
        if held is None:
            continue
        node = Node(row["namespace"], row["type"], row["id"])
        # An ingest's own blob is part of it.
        (graph.root if node.type == "ingests" else held)(node)
        if held == graph.flat and node.type == "images":
            flat_images.append(node)
    for node in flat_images:
        if node in graph.targets:
            graph.flat(graph.targets[node])
    for row in read("SELECT namespace, snapshotter, key FROM holds"):
        type = f"snapshots/{row['snapshotter']}" if row["snapshotter"] else "content"
        graph.root(Node(row["namespace"], type, row["key"]))
    return expired


def _labelled(read: Read, graph: _Graph, now: float) -> None:
    rows = read("SELECT namespace, digest, labels FROM visible WHERE labels LIKE '%containerd.io/gc.%'")
    for row in rows:
        node, labels = Node(row["namespace"], "content", row["digest"]), load(row["labels"])
        graph.label(node, labels)
        if is_root(labels, now):
            graph.root(node)


def _kept(read: Read, graph: _Graph) -> int:
    """Roots what has come to be a root, or been one, since the epoch was opened; returns the last row seen."""
    seen = 0
    for row in read("SELECT rowid, * FROM collection_kept"):
        seen = max(seen, row["rowid"])
        for node in _kept_by(row):
            graph.root(node)
    return seen


def _kept_by(row: Any) -> Iterator[Node]:
    """What a row keeps: the thing itself, and what its labels refer to, or did."""
    yield Node(row["namespace"], row["type"], row["id"])
    yield from references(row["namespace"], load(row["labels"]))


def changed_since(read: Read, seen: int) -> set[Node]:
    """What is led to by what has come to be a root, or changed, since a mark: a walk of that alone.

    It is for the transaction of a sweep, and looks up row by row what a mark reads whole.
    """
    reached: set[Node] = set()
    rows = read("SELECT * FROM collection_kept WHERE rowid > ?", (seen,))
    pending = [node for row in rows for node in _kept_by(row)]
    while pending:
        node = pending.pop()
        if node in reached:
            continue
        reached.add(node)
        if node.type == "images":
            for row in read("SELECT target, labels FROM images WHERE namespace = ? AND name = ?", (node[0], node[2])):
                pending.append(Node(node.namespace, "content", json.loads(row["target"])["digest"]))
                pending += references(node.namespace, load(row["labels"]))
        elif node.type == "content":
            labelled = [
                target
                for row in read("SELECT labels FROM visible WHERE namespace = ? AND digest = ?", (node[0], node[2]))
                for target in references(node.namespace, load(row["labels"]))
            ]
            pending += labelled
            if not any(target.type == "content" for target in labelled):
                rows = read("SELECT child FROM blob_references WHERE parent = ?", (node.id,))
                pending += [Node(node.namespace, "content", row["child"]) for row in rows]
    return reached


def _of_others(elsewhere: Elsewhere, graph: _Graph) -> None:
    for holder in elsewhere.holders:
        node = Node(holder.namespace, _CONTAINER, holder.id)
        graph.root(node)
        graph.references[node] += [Node(holder.namespace, f"snapshots/{name}", key) for name, key in holder.snapshots]
        graph.label(node, holder.labels)
    for one in elsewhere.snapshots:
        node = Node(one.namespace, f"snapshots/{one.snapshotter}", one.key)
        graph.label(node, one.labels)
        if one.held:
            graph.root(node)
    for mounted in elsewhere.mounts:
        node = Node(mounted.namespace, MOUNTS, mounted.name)
        graph.label(node, mounted.labels)
        if mounted.lease:
            graph.references[Node(mounted.namespace, _LEASE, mounted.lease)].append(node)
