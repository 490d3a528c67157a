"""Figures of cgroup v1, whose controllers have a directory each (kernel documentation, admin-guide/cgroup-v1)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from shoal_bus.api.runtime import (
    BlockDevice,
    BlockEntry,
    BlockMetrics,
    CpuMetrics,
    HugePages,
    MemoryMetrics,
    MemoryUse,
)

from shoal_runtime.metrics import shared
from shoal_runtime.metrics.files import flat, number, read, read_number

_TICK_NANOSECONDS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_BLKIO = {"io_service_bytes_recursive": "bytes", "io_serviced_recursive": "operations"}
_FIELDS = {
    ("bytes", "Read"): "read_bytes", ("bytes", "Write"): "write_bytes", ("bytes", "Discard"): "discarded_bytes",
    ("operations", "Read"): "reads", ("operations", "Write"): "writes", ("operations", "Discard"): "discards",
}  # fmt: skip


def cpu(accounting: str, bandwidth: str = "", *, raw: bool = True) -> CpuMetrics | None:
    """`cpuacct.*` in the directory `accounting`, and `cpu.*` in `bandwidth` where there is that controller."""
    usage = read_number(accounting, "cpuacct.usage")
    if usage is None:
        return None
    ticks = flat(read(accounting, "cpuacct.stat"))
    stat = flat(read(bandwidth, "cpu.stat")) if bandwidth else {}
    per_cpu = (read(accounting, "cpuacct.usage_percpu") or "").split() if raw else []
    return CpuMetrics(
        usage=usage,
        user=ticks.get("user", 0) * _TICK_NANOSECONDS,
        system=ticks.get("system", 0) * _TICK_NANOSECONDS,
        limit=_cpu_limit(bandwidth) if bandwidth else None,
        periods=stat.get("nr_periods", 0),
        throttled_periods=stat.get("nr_throttled", 0),
        throttled=stat.get("throttled_time", 0),
        per_cpu=[int(one) for one in per_cpu],
        stat=stat if raw else {},
    )


def _cpu_limit(directory: str) -> float | None:
    quota, period = read_number(directory, "cpu.cfs_quota_us"), read_number(directory, "cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def memory(directory: str, *, raw: bool = True) -> MemoryMetrics | None:
    """`memory.*`. Figures of `memory.stat` are the `total_` ones: those of the cgroups below it, too."""
    use = _memory_use(directory, "memory")
    if use is None:
        return None
    stat = flat(read(directory, "memory.stat"))
    oom_control = flat(read(directory, "memory.oom_control"))
    return MemoryMetrics(
        **use.model_dump(),
        host=shared.host_memory(),
        working_set=max(0, use.usage - stat.get("total_inactive_file", 0)),
        anon=stat.get("total_rss", 0),
        file=stat.get("total_cache", 0),
        swapped=stat.get("total_swap", 0),
        oom_kills=oom_control.get("oom_kill", 0),
        memsw=_memory_use(directory, "memory.memsw") if raw else None,
        kernel=_memory_use(directory, "memory.kmem") if raw else None,
        kernel_tcp=_memory_use(directory, "memory.kmem.tcp") if raw else None,
        stat=stat if raw else {},
        oom_control=oom_control if raw else {},
    )


def _memory_use(directory: str, kind: str) -> MemoryUse | None:
    usage = read_number(directory, f"{kind}.usage_in_bytes")
    if usage is None:
        return None
    return MemoryUse(
        usage=usage,
        peak=read_number(directory, f"{kind}.max_usage_in_bytes") or 0,
        limit=_limit(read_number(directory, f"{kind}.limit_in_bytes"), _PAGE),
        limit_hits=read_number(directory, f"{kind}.failcnt") or 0,
    )


def _limit(value: int | None, page: int) -> int | None:
    """A limit in bytes. No limit is the largest number of pages whose bytes a signed 64-bit number holds."""
    return None if value is None or value < 0 or value >= (1 << 63) - page else value


def blkio(directory: str, *, raw: bool = True) -> BlockMetrics | None:
    """`blkio.throttle.*`, which counts whatever the scheduler of a device is."""
    entries: list[BlockEntry] = []
    there = False
    for file in _BLKIO:
        text = read(directory, f"blkio.throttle.{file}")
        if text is None:  # before Linux 4.18
            text = read(directory, f"blkio.throttle.{file.removesuffix('_recursive')}")
        there = there or text is not None
        entries += _entries(file, text or "")
    if not there:
        return None
    return BlockMetrics(devices=_devices(entries), entries=entries if raw else [])


def _entries(file: str, text: str) -> Iterator[BlockEntry]:
    """Lines as `8:16 Read 4096`; the last one is a sum without a device."""
    for line in text.splitlines():
        device, _, rest = line.partition(" ")
        op, _, value = rest.rpartition(" ")
        major, colon, minor = device.partition(":")
        if colon and (amount := number(value)) is not None:
            yield BlockEntry(file=file, major=int(major), minor=int(minor), op=op, value=amount)


def _devices(entries: Sequence[BlockEntry]) -> list[BlockDevice]:
    found: dict[tuple[int, int], BlockDevice] = {}
    for entry in entries:
        key = (entry.major, entry.minor)
        if key not in found:
            found[key] = BlockDevice(major=entry.major, minor=entry.minor, device=shared.device_name(*key))
        if field := _FIELDS.get((_BLKIO[entry.file], entry.op)):
            setattr(found[key], field, entry.value)
    return list(found.values())


def hugetlb(directory: str, page_sizes: Sequence[str]) -> list[HugePages]:
    """`hugetlb.<size>.*` of each size of huge pages."""
    found = []
    for size in page_sizes:
        usage = read_number(directory, f"hugetlb.{size}.usage_in_bytes")
        if usage is not None:
            found.append(
                HugePages(
                    page_size=size,
                    usage=usage,
                    peak=read_number(directory, f"hugetlb.{size}.max_usage_in_bytes") or 0,
                    limit=_limit(read_number(directory, f"hugetlb.{size}.limit_in_bytes"), _bytes(size)),
                    limit_hits=read_number(directory, f"hugetlb.{size}.failcnt") or 0,
                )
            )
    return found


def _bytes(size: str) -> int:
    return int(size[:-2]) << {"KB": 10, "MB": 20, "GB": 30}[size[-2:]]
