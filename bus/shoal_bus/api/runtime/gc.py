"""The runtime service's part in garbage collection (`shoal_bus.collection`)."""

from __future__ import annotations

from datetime import datetime

from shoal_bus.collection import Epoch, Holder, Opened
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Labels
from shoal_bus.verb import StreamVerb, Verb, behaves


class CollectibleMount(Message):
    """An activation, with what decides whether it stays: its lease, and the labels that matter."""

    namespace: str
    name: str
    lease: str
    labels: Labels
    created_at: datetime


class SweepMounts(Request):
    """Activations to be taken away, each only if it still may be."""

    token: str
    namespace: str
    names: list[str]


class SweptMounts(Message):
    """Those that are gone."""

    names: list[str] = []


GC_OPEN = Verb(
    "runtime",
    "gc",
    "open",
    Epoch,
    Opened,
    mutates=True,
    behaviour=behaves("Opens a collection's epoch: what a container holds from here on is told.", whole_node=True),
)
GC_HOLDERS = StreamVerb(
    "runtime",
    "gc",
    "holders",
    Epoch,
    Holder,
    behaviour=behaves("What containers, and runs that will be containers, hold.", "ABORTED", whole_node=True),
)
GC_MOUNTS = StreamVerb(
    "runtime",
    "gc",
    "mounts",
    Epoch,
    CollectibleMount,
    behaviour=behaves("Every activation that no task uses.", "ABORTED", whole_node=True),
)
GC_SWEEP = Verb(
    "runtime",
    "gc",
    "sweep",
    SweepMounts,
    SweptMounts,
    mutates=True,
    behaviour=behaves("Takes away activations that nothing refers to.", "ABORTED", whole_node=True),
)
GC_CLOSE = Verb(
    "runtime",
    "gc",
    "close",
    Epoch,
    Empty,
    mutates=True,
    behaviour=behaves("Closes a collection's epoch.", whole_node=True),
)
