"""How long a measurement may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """`rounds` of `seconds` for a rate on each side; `samples` for a latency; `containers` at once for memory."""

    rounds: int = 5
    seconds: float = 4.0
    samples: int = 200
    containers: int = 50


FULL = Effort()
QUICK = Effort(rounds=3, seconds=1.0, samples=30, containers=50)
