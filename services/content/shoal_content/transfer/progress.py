"""How far a pull is, as its caller is told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from shoal_bus.api.content import LayerProgress, PullProgress
from shoal_bus.types import Descriptor

from shoal_content.media import CONFIGS

_MOST = 1000
"""Blobs that are shown one by one."""
_RATE_SECONDS, _RATE_STEP = 3.0, 0.2
LayerState = Literal["waiting", "downloading", "downloaded", "extracting", "done", "exists"]


class Progress:
    """The state of one pull's layers; each change is reported."""

    def __init__(self, name: str, report: Callable[[PullProgress], None]) -> None:
        self._told = PullProgress(name=name)
        self._report = report
        self._bytes: list[int] = []
        self._unpacked = 0
        """How many layers, the first ones, are unpacked besides."""
        self._rate = Rate()

    def resolving(self) -> None:
        """The registry is being asked."""
        self._report(self._told)

    def layers(self, layers: Sequence[Descriptor]) -> None:
        """What there is to fetch is known."""
        self._told.layers = [LayerProgress(digest=one.digest, size=one.size) for one in layers]
        self._told.bytes_total = sum(one.size for one in layers)
        self._bytes = [0] * len(layers)
        self._unpacked = len(layers)
        self._told.state = "fetching"
        self._report(self._told)

    def beyond(self, blob: Descriptor) -> int | None:
        """One more blob is to be fetched, which isn't unpacked: its number, or None for one that isn't shown."""
        listed = self._told.layers
        if blob.media_type in CONFIGS or len(listed) >= _MOST or any(one.digest == blob.digest for one in listed):
            return None
        listed.append(LayerProgress(digest=blob.digest, size=blob.size))
        self._told.bytes_total += blob.size
        self._bytes.append(0)
        self._told.state = "fetching"
        self._report(self._told)
        return len(listed) - 1

    def layer(self, at: int, state: LayerState, *, arrived: int | None = None, offset: int | None = None) -> None:
        """A layer's state; how many bytes of it have arrived, and (while it is extracted) how far that is."""
        layer = self._told.layers[at]
        layer.state = state
        if arrived is not None:
            self._bytes[at] = arrived
            self._told.bytes_done = sum(self._bytes)
            self._told.rate = self._rate.of(self._told.bytes_done, time.monotonic())
            layer.offset = arrived
        if offset is not None:
            layer.offset = offset
        if self._told.bytes_done == self._told.bytes_total and at < self._unpacked:
            self._told.state = "unpacking"
        self._report(self._told)

    def waiting(self, told: str) -> None:
        """What the registry has us wait for; empty once it is over."""
        self._told.waiting = told
        self._report(self._told)

    def done(self) -> None:
        """All of it is there."""
        self._told.state, self._told.rate = "done", 0.0
        self._report(self._told)


class Rate:
    """How fast something grows, over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, total: int, now: float) -> float:
        """Bytes a second, `total` having come until `now` (seconds). What takes no time yet has no rate."""
        if not self._seen or now - self._seen[-1][0] >= _RATE_STEP:
            self._seen.append((now, total))
        while len(self._seen) > 1 and now - self._seen[1][0] >= _RATE_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        return max(0, total - before) / (now - since) if now > since else 0.0
