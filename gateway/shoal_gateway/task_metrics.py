"""What a task uses as containerd's clients have it: the figures of cgroups v1, or of v2 where there is nothing else.

Where a limit isn't set, cgroups v1 has the largest number of pages in bytes and 0 for processes; v2 has the largest
number there is (containerd/cgroups, cgroup1 and cgroup2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.message import Message
from shoal_bus.api import runtime

from shoal_gateway.proto.io.containerd.cgroups.v1 import metrics_pb2 as v1
from shoal_gateway.proto.io.containerd.cgroups.v2 import metrics_pb2 as v2

_UNLIMITED = (1 << 64) - 1
_PAGES = (1 << 63) - 4096
_MICROSECOND = 1_000
_STAT_V1 = {
    "cache": "cache", "rss": "rss", "rss_huge": "rss_huge", "mapped_file": "mapped_file", "dirty": "dirty",
    "writeback": "writeback", "pgpgin": "pg_pg_in", "pgpgout": "pg_pg_out", "pgfault": "pg_fault",
    "pgmajfault": "pg_maj_fault", "inactive_anon": "inactive_anon", "active_anon": "active_anon",
    "inactive_file": "inactive_file", "active_file": "active_file", "unevictable": "unevictable",
}  # fmt: skip
"""Keys of v1's `memory.stat`, each there with `total_`, too, and their fields."""
_HIERARCHICAL = {
    "hierarchical_memory_limit": "hierarchical_memory_limit", "hierarchical_memsw_limit": "hierarchical_swap_limit",
}  # fmt: skip
_STAT_V2 = (
    "anon", "file", "kernel_stack", "slab", "sock", "shmem", "file_mapped", "file_dirty", "file_writeback", "anon_thp",
    "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable", "slab_reclaimable",
    "slab_unreclaimable", "pgfault", "pgmajfault", "workingset_refault", "workingset_activate",
    "workingset_nodereclaim", "pgrefill", "pgscan", "pgsteal", "pgactivate", "pgdeactivate", "pglazyfree",
    "pglazyfreed", "thp_fault_alloc", "thp_collapse_alloc", "workingset_refault_anon", "workingset_refault_file",
    "workingset_activate_anon", "workingset_activate_file",
)  # fmt: skip
"""Keys of v2's `memory.stat` that are fields by the same name."""
_CPU_V2 = (
    "usage_usec", "user_usec", "system_usec", "nr_periods", "nr_throttled", "throttled_usec", "nr_bursts", "burst_usec",
)  # fmt: skip
_EVENTS = ("low", "high", "max", "oom", "oom_kill", "oom_group_kill")


def figures(task: runtime.ContainerMetrics) -> v1.Metrics | v2.Metrics:
    """The message for the node's cgroups: v1's also where v2 is mounted beside it."""
    return _unified(task) if task.cgroups == "unified" else _legacy(task)


# ----------------------------------------------------------------------------------------------------------- cgroups v1


def _legacy(task: runtime.ContainerMetrics) -> v1.Metrics:
    told = v1.Metrics()
    if task.cpu is not None:
        usage = v1.CPUUsage(total=task.cpu.usage, kernel=task.cpu.system, user=task.cpu.user, per_cpu=task.cpu.per_cpu)
        throttling = v1.Throttle(
            periods=task.cpu.periods,
            throttled_periods=task.cpu.throttled_periods,
            throttled_time=task.cpu.throttled,
        )
        told.cpu.CopyFrom(v1.CPUStat(usage=usage, throttling=throttling))
    if task.memory is not None:
        told.memory.CopyFrom(_memory_v1(task.memory))
        told.memory_oom_control.CopyFrom(
            v1.MemoryOomControl(
                oom_kill_disable=task.memory.oom_control.get("oom_kill_disable", 0),
                under_oom=task.memory.oom_control.get("under_oom", 0),
                oom_kill=task.memory.oom_kills,
            )
        )
    if task.pids is not None:
        told.pids.CopyFrom(v1.PidsStat(current=task.pids.current, limit=task.pids.limit or 0))
    if task.blkio is not None:
        told.blkio.SetInParent()
        devices = {(one.major, one.minor): one.device for one in task.blkio.devices}
        for entry in task.blkio.entries:
            entries = getattr(told.blkio, entry.file)
            device = devices.get((entry.major, entry.minor), "")
            entries.add(op=entry.op, device=device, major=entry.major, minor=entry.minor, value=entry.value)
    for pages in task.hugetlb:
        told.hugetlb.add(usage=pages.usage, max=pages.peak, failcnt=pages.limit_hits, pagesize=pages.page_size)
    for rdma in task.rdma:
        told.rdma.current.add(device=rdma.device, hca_handles=rdma.handles, hca_objects=rdma.objects)
        told.rdma.limit.add(
            device=rdma.device, hca_handles=_rdma(rdma.handle_limit), hca_objects=_rdma(rdma.object_limit)
        )
    return told


def _memory_v1(memory: runtime.MemoryMetrics) -> v1.MemoryStat:
    told = v1.MemoryStat(usage=_entry(memory))
    for name, use in (("swap", memory.memsw), ("kernel", memory.kernel), ("kernel_tcp", memory.kernel_tcp)):
        if use is not None:
            getattr(told, name).CopyFrom(_entry(use))
    for key, field in _STAT_V1.items():
        setattr(told, field, memory.stat.get(key, 0))
        setattr(told, f"total_{field}", memory.stat.get(f"total_{key}", 0))
    for key, field in _HIERARCHICAL.items():
        setattr(told, field, memory.stat.get(key, 0))
    return told


def _entry(use: runtime.MemoryUse) -> v1.MemoryEntry:
    limit = _PAGES if use.limit is None else use.limit
    return v1.MemoryEntry(limit=limit, usage=use.usage, max=use.peak, failcnt=use.limit_hits)


# ----------------------------------------------------------------------------------------------------------- cgroups v2


def _unified(task: runtime.ContainerMetrics) -> v2.Metrics:
    told = v2.Metrics(rdma=v2.RdmaStat(), io=v2.IOStat())
    if task.pids is not None:
        told.pids.CopyFrom(v2.PidsStat(current=task.pids.current, limit=_or_max(task.pids.limit)))
    if task.cpu is not None:
        told.cpu.SetInParent()
        _set(told.cpu, _CPU_V2, task.cpu.stat)
        _add_pressure(told.cpu, task.pressure.get("cpu"))
    if task.memory is not None:
        told.memory.CopyFrom(_memory_v2(task.memory))
        _add_pressure(told.memory, task.pressure.get("memory"))
        told.memory_events.SetInParent()
        _set(told.memory_events, _EVENTS, task.memory.events)
    for device in task.blkio.devices if task.blkio is not None else ():
        told.io.usage.add(
            major=device.major, minor=device.minor, rbytes=device.read_bytes, wbytes=device.write_bytes,
            rios=device.reads, wios=device.writes,
        )  # fmt: skip
    _add_pressure(told.io, task.pressure.get("io"))
    for pages in task.hugetlb:
        told.hugetlb.add(
            current=pages.usage, max=_or_max(pages.limit), pagesize=pages.page_size, failcnt=pages.limit_hits
        )
    for rdma in task.rdma:
        told.rdma.current.add(device=rdma.device, hca_handles=rdma.handles, hca_objects=rdma.objects)
        told.rdma.limit.add(
            device=rdma.device, hca_handles=_rdma(rdma.handle_limit), hca_objects=_rdma(rdma.object_limit)
        )
    return told


def _memory_v2(memory: runtime.MemoryMetrics) -> v2.MemoryStat:
    told = v2.MemoryStat(usage=memory.usage, usage_limit=_or_max(memory.limit), max_usage=memory.peak)
    _set(told, _STAT_V2, memory.stat)
    if memory.swap is not None:
        told.swap_usage, told.swap_limit = memory.swap.usage, _or_max(memory.swap.limit)
        told.swap_max_usage = memory.swap.peak
    return told


def _set(told: Message, names: Sequence[str], figures: Mapping[str, int]) -> None:
    """Sets the fields that there are figures for."""
    for name in names:
        if name in figures:
            setattr(told, name, figures[name])


def _add_pressure(told: v2.CPUStat | v2.MemoryStat | v2.IOStat, pressure: runtime.Pressure | None) -> None:
    if pressure is not None:
        told.psi.some.CopyFrom(_stall(pressure.some))
        if pressure.full is not None:
            told.psi.full.CopyFrom(_stall(pressure.full))


def _stall(stall: runtime.Stall) -> v2.PSIData:
    total = stall.total // _MICROSECOND
    return v2.PSIData(avg10=stall.avg10, avg60=stall.avg60, avg300=stall.avg300, total=total)


def _or_max(limit: int | None) -> int:
    return _UNLIMITED if limit is None else limit


def _rdma(limit: int | None) -> int:
    return (1 << 32) - 1 if limit is None else limit
