"""The snapshot service's part in garbage collection (`shoal_bus.collection`).

A snapshotter that is a process of its own takes part by answering the same verbs under its name.
"""

from __future__ import annotations

from shoal_bus.collection import Candidate, Epoch, LabelledSnapshot, Opened, Sweep, Swept
from shoal_bus.message import Empty
from shoal_bus.verb import StreamVerb, Verb, behaves

GC_OPEN = Verb(
    "snapshot",
    "gc",
    "open",
    Epoch,
    Opened,
    mutates=True,
    behaviour=behaves("Opens a collection's epoch: what is made or looked at from here on stays.", whole_node=True),
)
GC_LABELLED = StreamVerb(
    "snapshot",
    "gc",
    "labelled",
    Epoch,
    LabelledSnapshot,
    behaviour=behaves("Every snapshot with labels for garbage collection.", "ABORTED", whole_node=True),
)
GC_CANDIDATES = StreamVerb(
    "snapshot",
    "gc",
    "candidates",
    Epoch,
    Candidate,
    behaviour=behaves("What may be removed unless something refers to it.", "ABORTED", whole_node=True),
)
GC_SWEEP = Verb(
    "snapshot",
    "gc",
    "sweep",
    Sweep,
    Swept,
    mutates=True,
    behaviour=behaves("Removes snapshots that nothing refers to, those that still may be.", "ABORTED", whole_node=True),
)
GC_CLOSE = Verb(
    "snapshot",
    "gc",
    "close",
    Epoch,
    Empty,
    mutates=True,
    behaviour=behaves("Closes a collection's epoch.", whole_node=True),
)
