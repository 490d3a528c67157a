"""Whole life cycles by containerd's API: how many a second, and where the time of one goes."""

from __future__ import annotations

from bench.support.effort import Effort
from bench.support.figures import Row, compare
from bench.support.lifecycle import CONCURRENCY, STEP_BY_STEP, Steps, lifecycle, rate
from bench.support.sockets import Sockets


async def measure(both: Sockets, effort: Effort) -> list[Row]:
    """Rates of both sides, a request for each step, in turn."""
    rows = []
    for concurrency in CONCURRENCY:
        steps = {side.name: Steps() for side in both.sides}
        rates: dict[str, list[float]] = {side.name: [] for side in both.sides}
        for side in both.sides:
            await lifecycle(side, Steps())  # what is cold the first time
        for _ in range(effort.rounds):
            for side in both.sides:
                taken = steps[side.name]
                rates[side.name].append(
                    await rate(
                        lambda side=side, taken=taken: lifecycle(side, taken),  # type: ignore[misc]
                        seconds=effort.seconds,
                        concurrency=concurrency,
                    )
                )
        both.steps |= {f"{name}, {concurrency} at once": taken.mean_ms() for name, taken in steps.items()}
        rows.append(
            compare(
                f"lifecycles, {concurrency} at once", "1/s", rates["containerd"], rates["shoal"],
                higher_is_better=True, budget=STEP_BY_STEP,
            )
        )  # fmt: skip
    return rows
