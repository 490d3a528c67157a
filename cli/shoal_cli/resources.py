"""Limits as people write them on a command line, as OCI has them (runtime-spec, config-linux.md#control-groups)."""

from __future__ import annotations

import re
from typing import Any

from shoal_bus.errors import InvalidArgument

CPU_PERIOD = 100_000
"""Microseconds: what a quota of CPU time is counted in, the kernel's own default."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = "bkmgt"


def memory_bytes(text: str, option: str) -> int:
    """`512m`, `1.5GiB` or a plain number as bytes; units are powers of 1024. `-1` is no limit.

    >>> memory_bytes("1.5k", "--memory")
    1536
    """
    if text == "-1":
        return -1
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidArgument(f"{option} {text!r}: is no size", hint="as 512m, 2g or a number of bytes")
    number, unit = found.groups()
    return int(float(number) * 1024 ** _UNITS.index(unit.lower() or "b"))


def cpu_quota(cpus: float) -> int:
    """So many CPUs as microseconds in each `CPU_PERIOD`."""
    if cpus < 0.01:
        raise InvalidArgument(f"--cpus {cpus:g}: must be at least 0.01")
    return int(cpus * CPU_PERIOD)


def run_limits(*, memory: str, cpus: float | None, pids_limit: int) -> dict[str, Any]:
    """What a run is to be limited to, as its request has it (`RunResources`)."""
    limits: dict[str, Any] = {"pids_limit": pids_limit}
    if memory:
        limits["memory"] = memory_bytes(memory, "--memory")
    if cpus is not None:
        limits |= {"cpu_quota": cpu_quota(cpus), "cpu_period": CPU_PERIOD}
    return limits


def new_limits(
    *, memory: str, memory_swap: str, cpus: float | None, cpu_shares: int | None, cpuset_cpus: str, cpuset_mems: str,
    pids_limit: int | None, blkio_weight: int | None,
) -> dict[str, Any]:  # fmt: skip
    """OCI's `resources` with what is given, and nothing else. INVALID_ARGUMENT when nothing is."""
    groups: dict[str, dict[str, Any]] = {
        "memory": {
            "limit": memory_bytes(memory, "--memory") if memory else None,
            "swap": memory_bytes(memory_swap, "--memory-swap") if memory_swap else None,
        },
        "cpu": {
            "quota": cpu_quota(cpus) if cpus is not None else None,
            "period": CPU_PERIOD if cpus is not None else None,
            "shares": cpu_shares, "cpus": cpuset_cpus or None, "mems": cpuset_mems or None,
        },
        "pids": {"limit": pids_limit},
        "blockIO": {"weight": blkio_weight},
    }  # fmt: skip
    given = {group: {key: v for key, v in fields.items() if v is not None} for group, fields in groups.items()}
    limits = {group: fields for group, fields in given.items() if fields}
    if not limits:
        raise InvalidArgument("nothing to change", hint="give a limit, as --memory 512m")
    return limits
