"""What cgroup v1 and v2 have alike: processes, RDMA, the sizes of huge pages, the names of devices."""

from __future__ import annotations

import os
from functools import cache

from shoal_bus.api.runtime import PidsMetrics, RdmaDevice

from shoal_runtime.metrics.files import flat, nested, number, read, read_number

_HUGE_PAGES = "/sys/kernel/mm/hugepages"


def pids(directory: str) -> PidsMetrics | None:
    """`pids.*` of a cgroup, or None where it has no such controller."""
    current = read_number(directory, "pids.current")
    if current is None:
        return None
    return PidsMetrics(
        current=current, limit=read_number(directory, "pids.max"), peak=read_number(directory, "pids.peak") or 0,
        limit_hits=flat(read(directory, "pids.events")).get("max", 0),
    )  # fmt: skip


def rdma(directory: str) -> list[RdmaDevice]:
    """`rdma.*` of a cgroup, by device."""
    current = nested(read(directory, "rdma.current"))
    limits = nested(read(directory, "rdma.max")) if current else {}
    return [
        RdmaDevice(
            device=device,
            handles=number(held.get("hca_handle")) or 0,
            objects=number(held.get("hca_object")) or 0,
            handle_limit=number(limits.get(device, {}).get("hca_handle")),
            object_limit=number(limits.get(device, {}).get("hca_object")),
        )
        for device, held in current.items()
    ]


def device_name(major: int, minor: int) -> str:
    """The path of a block device, as `/dev/vda`; empty where the kernel has none by that number."""
    try:
        return "/dev/" + os.path.basename(os.readlink(f"/sys/dev/block/{major}:{minor}"))  # noqa: PTH115, PTH119
    except OSError:
        return ""


@cache
def huge_page_sizes(directory: str = _HUGE_PAGES) -> tuple[str, ...]:
    """The sizes of huge pages the kernel has, as its `hugetlb` controller names them: `64KB`, `2MB`, `1GB`."""
    try:
        found = [name.removeprefix("hugepages-").removesuffix("kB") for name in os.listdir(directory)]  # noqa: PTH208
    except OSError:
        return ()
    return tuple(_named(int(kilobytes)) for kilobytes in sorted(found, key=int))


def _named(kilobytes: int) -> str:
    for size, unit in ((1 << 20, "GB"), (1 << 10, "MB")):
        if kilobytes >= size:
            return f"{kilobytes // size}{unit}"
    return f"{kilobytes}KB"


def host_memory() -> int:
    """The machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
