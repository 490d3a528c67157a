"""How far a push is, as its caller is told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from shoal_bus.api.content import BlobProgress, PushProgress
from shoal_bus.types import Descriptor

BlobState = Literal["waiting", "uploading", "done", "exists", "mounted", "skipped"]
_EVERY_SECONDS = 0.1
_RATE_SECONDS = 3.0


class Pushing:
    """The state of one push's blobs. Changes of state are reported at once, bytes now and then."""

    def __init__(self, name: str, report: Callable[[PushProgress], None]) -> None:
        self._told, self._report = PushProgress(name=name), report
        self._at: dict[str, int] = {}
        self._sent: deque[tuple[float, int]] = deque()
        self._reported = 0.0

    def preparing(self) -> None:
        """What there is to push is being looked at."""
        self._report(self._told)

    def blobs(self, blobs: Sequence[Descriptor], skipped: Sequence[Descriptor]) -> None:
        """What there is to push is known."""
        self._told.blobs = [BlobProgress(digest=one.digest, size=one.size) for one in blobs]
        self._told.blobs += [BlobProgress(digest=one.digest, size=one.size, state="skipped") for one in skipped]
        self._told.bytes_total = sum(one.size for one in blobs)
        self._at = {one.digest: at for at, one in enumerate(self._told.blobs)}
        self._told.state = "pushing"
        self._report(self._told)

    def blob(self, digest: str, state: BlobState, offset: int) -> None:
        """A blob's state, and how many of its bytes the registry has."""
        blob, now = self._told.blobs[self._at[digest]], time.monotonic()
        changed = blob.state != state
        if state == "uploading" and offset > blob.offset:
            self._sent.append((now, offset - blob.offset))
        self._told.bytes_done += offset - blob.offset
        blob.state, blob.offset = state, offset
        if changed or now - self._reported > _EVERY_SECONDS:
            self._reported = now
            self._told.rate = self._rate(now)
            self._report(self._told)

    def waiting(self, told: str) -> None:
        """What the registry has us wait for; empty once it is over."""
        self._told.waiting = told
        self._report(self._told)

    def naming(self) -> None:
        """All blobs are there."""
        self._told.state, self._told.rate = "naming", 0.0
        self._report(self._told)

    def done(self) -> None:
        """All of it is there."""
        self._told.state = "done"
        self._report(self._told)

    def _rate(self, now: float) -> float:
        while self._sent and now - self._sent[0][0] > _RATE_SECONDS:
            self._sent.popleft()
        if not self._sent:
            return 0.0
        return sum(count for _, count in self._sent) / max(now - self._sent[0][0], 0.5)
