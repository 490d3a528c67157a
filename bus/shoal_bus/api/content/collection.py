"""Garbage collection, on demand."""

from __future__ import annotations

from shoal_bus.message import Message, Request
from shoal_bus.verb import Verb, behaves


class Collect(Request):
    """`soon`: the reply doesn't wait, and says nothing of what is removed."""

    soon: bool = False


class Collected(Message):
    """One thing that a collection removed; `type` as a lease has it, and `leases`."""

    namespace: str
    type: str
    id: str


class Collection(Message):
    """What a collection removed, in every namespace of the node, and how many bytes of blobs are free again."""

    counts: dict[str, int] = {}
    """How many, by type."""
    bytes: int = 0
    removed: list[Collected] = []
    """The first thousand of them."""
    seconds: float = 0.0


NODE_GC = Verb(
    "content",
    "node",
    "gc",
    Collect,
    Collection,
    mutates=True,
    behaviour=behaves(
        "Removes the blobs, snapshots, ingests, leases, images and mounts that nothing holds any more.", whole_node=True
    ),
)
