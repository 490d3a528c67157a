"""How far a pull is, as its caller is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from shoal_bus.api.content import LayerProgress, PullProgress
from shoal_bus.types import Descriptor

LayerState = Literal["waiting", "downloading", "downloaded", "extracting", "done", "exists"]


class Progress:
    """The state of one pull's layers; each change is reported."""

    def __init__(self, name: str, report: Callable[[PullProgress], None]) -> None:
        self._told = PullProgress(name=name)
        self._report = report
        self._bytes: list[int] = []

    def resolving(self) -> None:
        """The registry is being asked."""
        self._report(self._told)

    def layers(self, layers: Sequence[Descriptor]) -> None:
        """What there is to fetch is known."""
        self._told.layers = [LayerProgress(digest=one.digest, size=one.size) for one in layers]
        self._told.bytes_total = sum(one.size for one in layers)
        self._bytes = [0] * len(layers)
        self._told.state = "fetching"
        self._report(self._told)

    def layer(self, at: int, state: LayerState, *, arrived: int | None = None, offset: int | None = None) -> None:
        """A layer's state; how many bytes of it have arrived, and (while it is extracted) how far that is."""
        layer = self._told.layers[at]
        layer.state = state
        if arrived is not None:
            self._bytes[at] = arrived
            self._told.bytes_done = sum(self._bytes)
            layer.offset = arrived
        if offset is not None:
            layer.offset = offset
        if self._told.bytes_done == self._told.bytes_total:
            self._told.state = "unpacking"
        self._report(self._told)

    def waiting(self, told: str) -> None:
        """What the registry has us wait for; empty once it is over."""
        self._told.waiting = told
        self._report(self._told)

    def done(self) -> None:
        """All of it is there."""
        self._told.state = "done"
        self._report(self._told)
