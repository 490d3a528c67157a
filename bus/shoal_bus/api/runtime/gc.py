"""The runtime service's part in garbage collection (`shoal_bus.collection`)."""

from __future__ import annotations

from shoal_bus.collection import Epoch, Holder, Opened
from shoal_bus.message import Empty
from shoal_bus.verb import StreamVerb, Verb, behaves

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
GC_CLOSE = Verb(
    "runtime",
    "gc",
    "close",
    Epoch,
    Empty,
    mutates=True,
    behaviour=behaves("Closes a collection's epoch.", whole_node=True),
)
