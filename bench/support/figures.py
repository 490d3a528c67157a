"""Figures, what they are compared with, and how they are shown."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure of both sides, each the median of `rounds`. A side that has none is None.

    `ratio` says how many times as good shoal's is (as fast, as light). Of rates it is the median over the rounds, each
    compared with the other side's right beside it, so that a machine that slows down meanwhile slows both. `budget` is
    what that ratio must be at least; `limit` what shoal's own figure may be at most, in the same unit.
    """

    name: str
    unit: str
    containerd: float | None
    shoal: float | None
    ratio: float | None = None
    budget: float | None = None
    limit: float | None = None
    rounds: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the budget is kept; None where there is none."""
        told = []
        if self.budget is not None and self.ratio is not None:
            told.append(self.ratio >= self.budget)
        if self.limit is not None and self.shoal is not None:
            told.append(self.shoal <= self.limit)
        return all(told) if told else None


def compare(
    name: str,
    unit: str,
    containerd: Sequence[float],
    shoal: Sequence[float],
    *,
    higher_is_better: bool = False,
    budget: float | None = None,
    limit: float | None = None,
    note: str = "",
) -> Row:
    """A row of both sides' rounds, taken in turn."""
    pairs = [(c, s) for c, s in zip(containerd, shoal, strict=False) if c > 0 and s > 0]
    ratios = [s / c if higher_is_better else c / s for c, s in pairs]
    return Row(
        name, unit, _median(containerd), _median(shoal), _median(ratios), budget, limit,
        {"containerd": list(containerd), "shoal": list(shoal)}, note,
    )  # fmt: skip


def whole(
    name: str, unit: str, figures: dict[str, float], rounds: dict[str, list[float]], *, limit: float | None = None
) -> Row:
    """A row of figures that are of all samples, whatever their round; less is better."""
    ratio = figures["containerd"] / figures["shoal"]
    return Row(name, unit, figures["containerd"], figures["shoal"], ratio, limit=limit, rounds=rounds)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent lie, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


# ------------------------------------------------------------------------------------------------------------- showing


def table(rows: Sequence[Row]) -> str:
    """The rows as text: both figures, shoal's ratio, and the budget."""
    header = ("", "unit", "containerd", "shoal", "ratio", "budget", "")
    lines = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
        cells += [line[column].rjust(widths[column]) for column in range(2, 6)]
        shown.append("  ".join([*cells, line[6]]).rstrip())
    return "\n".join(shown)


def _cells(row: Row) -> tuple[str, ...]:
    budget = []
    if row.budget is not None:
        budget.append(f"≥ {row.budget:g}x")
    if row.limit is not None:
        budget.append(f"≤ {row.limit:g}")
    verdict = {None: "", True: "kept", False: "MISSED"}[row.met]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    return (
        row.name, row.unit, _number(row.containerd), _number(row.shoal), ratio, ", ".join(budget),
        "  ".join(filter(None, (verdict, row.note))),
    )  # fmt: skip


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def steps_table(steps: dict[str, dict[str, float]]) -> str:
    """Mean milliseconds of each step, a column for each measurement."""
    names = list(dict.fromkeys(name for one in steps.values() for name in one))
    width = max(len(name) for name in names)
    lines = ["  ".join([" " * width, *(column.rjust(max(10, len(column))) for column in steps)])]
    for name in [*names, "sum"]:
        cells = []
        for column, one in steps.items():
            value = sum(one.values()) if name == "sum" else one.get(name)
            cells.append(("-" if value is None else f"{value:.2f}").rjust(max(10, len(column))))
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- JSON


def write(
    path: Path, rows: Sequence[Row], steps: dict[str, dict[str, float]], notes: Sequence[str], *, quick: bool
) -> None:
    """Everything as JSON, with what it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "machine": machine(),
        "quick": quick,
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        "mean_ms_of_each_step": steps,
        "notes": list(notes),
    }
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def machine() -> dict[str, Any]:
    """Processors, kernel, and the versions of what is compared."""
    return {
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "containerd": _first_line("containerd", "--version"),
        "runc": _first_line("runc", "--version"),
        "crun": _first_line("crun", "--version"),
    }


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.partition("\n")[0]
    except FileNotFoundError:
        return ""
