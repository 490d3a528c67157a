"""Figures of cgroup v2, where one directory has every controller's files (kernel documentation, cgroup-v2.rst)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal_bus.api.runtime import (
    BlockDevice,
    BlockMetrics,
    CpuMetrics,
    HugePages,
    MemoryMetrics,
    MemoryUse,
    Pressure,
    Stall,
)

from shoal_runtime.metrics import shared
from shoal_runtime.metrics.files import flat, nested, number, read, read_number

_MICROSECOND = 1_000
RESOURCES = ("cpu", "memory", "io")


def cpu(directory: str, *, raw: bool = True) -> CpuMetrics | None:
    """`cpu.stat`, which every cgroup has, and `cpu.max`, where the controller is enabled."""
    stat = flat(read(directory, "cpu.stat"))
    if "usage_usec" not in stat:
        return None
    return CpuMetrics(
        usage=stat["usage_usec"] * _MICROSECOND,
        user=stat.get("user_usec", 0) * _MICROSECOND,
        system=stat.get("system_usec", 0) * _MICROSECOND,
        limit=_cpu_limit(read(directory, "cpu.max")),
        periods=stat.get("nr_periods", 0),
        throttled_periods=stat.get("nr_throttled", 0),
        throttled=stat.get("throttled_usec", 0) * _MICROSECOND,
        stat=stat if raw else {},
    )


def _cpu_limit(text: str | None) -> float | None:
    quota, _, period = (text or "").strip().partition(" ")
    allowed, length = number(quota), number(period)
    return allowed / length if allowed is not None and length else None


def memory(directory: str, *, raw: bool = True) -> MemoryMetrics | None:
    """`memory.*`. `memory.events` counts what befell the cgroups below it, too."""
    usage = read_number(directory, "memory.current")
    if usage is None:
        return None
    stat = flat(read(directory, "memory.stat"))
    events = flat(read(directory, "memory.events"))
    swap = _swap(directory)
    return MemoryMetrics(
        usage=usage,
        peak=read_number(directory, "memory.peak") or 0,
        limit=read_number(directory, "memory.max"),
        limit_hits=events.get("max", 0),
        host=shared.host_memory(),
        working_set=max(0, usage - stat.get("inactive_file", 0)),
        anon=stat.get("anon", 0),
        file=stat.get("file", 0),
        swapped=swap.usage if swap is not None else 0,
        oom_kills=events.get("oom_kill", 0),
        min=_protection(read(directory, "memory.min")),
        low=_protection(read(directory, "memory.low")),
        high=read_number(directory, "memory.high"),
        swap=swap,
        stat=stat if raw else {},
        events=events if raw else {},
    )


def _protection(text: str | None) -> int:
    """Bytes that are protected: `max` is everything."""
    return shared.host_memory() if text is not None and text.strip() == "max" else number(text) or 0


def _swap(directory: str) -> MemoryUse | None:
    usage = read_number(directory, "memory.swap.current")
    if usage is None:
        return None
    return MemoryUse(
        usage=usage,
        peak=read_number(directory, "memory.swap.peak") or 0,
        limit=read_number(directory, "memory.swap.max"),
        limit_hits=flat(read(directory, "memory.swap.events")).get("max", 0),
    )


def blkio(directory: str) -> BlockMetrics | None:
    """`io.stat`, by device."""
    text = read(directory, "io.stat")
    if text is None:
        return None
    devices = []
    for device, told in nested(text).items():
        major, minor = (number(part) for part in device.partition(":")[::2])
        if major is None or minor is None:
            continue
        amounts = {key: number(value) or 0 for key, value in told.items()}
        devices.append(
            BlockDevice(
                major=major,
                minor=minor,
                device=shared.device_name(major, minor),
                read_bytes=amounts.get("rbytes", 0),
                write_bytes=amounts.get("wbytes", 0),
                reads=amounts.get("rios", 0),
                writes=amounts.get("wios", 0),
                discarded_bytes=amounts.get("dbytes", 0),
                discards=amounts.get("dios", 0),
            )
        )
    return BlockMetrics(devices=devices)


def hugetlb(directory: str, page_sizes: Sequence[str]) -> list[HugePages]:
    """`hugetlb.<size>.*` of each size of huge pages."""
    found = []
    for size in page_sizes:
        usage = read_number(directory, f"hugetlb.{size}.current")
        if usage is not None:
            found.append(
                HugePages(
                    page_size=size,
                    usage=usage,
                    limit=read_number(directory, f"hugetlb.{size}.max"),
                    limit_hits=flat(read(directory, f"hugetlb.{size}.events")).get("max", 0),
                )
            )
    return found


def pressure(directory: str) -> dict[str, Pressure]:
    """`<resource>.pressure` of each resource (accounting/psi.rst)."""
    found = {}
    for resource in RESOURCES:
        lines = {kind: _stall(told) for kind, told in nested(read(directory, f"{resource}.pressure")).items()}
        if "some" in lines:
            found[resource] = Pressure(some=lines["some"], full=lines.get("full"))
    return found


def _stall(told: Mapping[str, str]) -> Stall:
    averages = {key: float(told.get(key, 0)) for key in ("avg10", "avg60", "avg300")}
    return Stall(**averages, total=(number(told.get("total")) or 0) * _MICROSECOND)
