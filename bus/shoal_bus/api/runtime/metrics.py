"""What containers use, as their cgroups say: CPU, memory, processes, block devices, huge pages, RDMA, pressure.

One shape for cgroup v1, v2 and both at once. Bytes are bytes and times nanoseconds, whatever unit the kernel's file
has; a limit that isn't set is None; a controller that isn't there leaves its section out. What the kernel says in a map
of its own (`memory.stat`, `cpu.stat`, …) is there unchanged, too, for who needs a figure that isn't named here.
(Kernel documentation: admin-guide/cgroup-v1/*.rst, admin-guide/cgroup-v2.rst, accounting/psi.rst.)
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from shoal_bus.message import Message, Request
from shoal_bus.types import Filter
from shoal_bus.verb import StreamVerb, behaves

CgroupMode = Literal["legacy", "hybrid", "unified"]
"""The machine's: cgroup v1 alone, v1 with v2 beside it, v2 alone."""


class CpuMetrics(Message):
    """CPU time, in nanoseconds, and the bandwidth limit (`limit` in CPUs: 0.5 is half of one)."""

    usage: int
    user: int = 0
    system: int = 0
    """Cgroup v1 counts these two in ticks of a hundredth of a second."""
    limit: float | None = None
    periods: int = 0
    """Periods of the bandwidth limit in which something ran, and how many of them the limit cut short."""
    throttled_periods: int = 0
    throttled: int = 0
    """Time spent held back by the limit."""
    per_cpu: list[int] = []
    """Time on each CPU of the machine: cgroup v1 alone says so."""
    stat: dict[str, int] = {}
    """`cpu.stat` as it is: v2 has microseconds in it."""


class MemoryUse(Message):
    """Bytes of one kind of memory; `limit_hits` counts how often `limit` was reached (v1: `failcnt`)."""

    usage: int
    peak: int = 0
    limit: int | None = None
    limit_hits: int = 0


class MemoryMetrics(MemoryUse):
    """Memory of every kind together, in bytes, with what it is made of."""

    host: int
    """The machine's memory: what there is where there is no limit."""
    working_set: int
    """`usage` without file pages that haven't been used lately: what can't be taken back easily."""
    anon: int = 0
    file: int = 0
    swapped: int = 0
    oom_kills: int = 0
    """Processes the kernel has killed here for a memory limit."""
    min: int = 0
    low: int = 0
    high: int | None = None
    """Cgroup v2's protections and its throttling limit."""
    swap: MemoryUse | None = None
    """Cgroup v2's `memory.swap`: swap alone."""
    memsw: MemoryUse | None = None
    """Cgroup v1's `memory.memsw`: memory and swap together."""
    kernel: MemoryUse | None = None
    kernel_tcp: MemoryUse | None = None
    """Cgroup v1's `memory.kmem` and `memory.kmem.tcp`."""
    stat: dict[str, int] = {}
    """`memory.stat` as it is."""
    events: dict[str, int] = {}
    """Cgroup v2's `memory.events` as it is."""
    oom_control: dict[str, int] = {}
    """Cgroup v1's `memory.oom_control` as it is."""


class PidsMetrics(Message):
    """Processes and threads. `peak` (0 where the kernel doesn't count it) is the most there have been."""

    current: int
    limit: int | None = None
    peak: int = 0
    limit_hits: int = 0


class BlockDevice(Message):
    """What went to and from one block device: bytes, and operations. `device` is its path, where it has one."""

    major: int
    minor: int
    device: str = ""
    read_bytes: int = 0
    write_bytes: int = 0
    reads: int = 0
    writes: int = 0
    discarded_bytes: int = 0
    discards: int = 0


class BlockEntry(Message):
    """One line of a `blkio` file of cgroup v1; `file` as `io_service_bytes_recursive`, `op` as `Read` or `Async`."""

    file: str
    major: int
    minor: int
    op: str
    value: int


class BlockMetrics(Message):
    """Block input and output, by device. A page cache's writing back counts where the file system supports it (v2)."""

    devices: list[BlockDevice] = []
    entries: list[BlockEntry] = []
    """What cgroup v1 says, as it is."""


class HugePages(Message):
    """Huge pages of one size (as `2MB`), in bytes."""

    page_size: str
    usage: int
    peak: int = 0
    """Cgroup v1 alone says so."""
    limit: int | None = None
    limit_hits: int = 0


class RdmaDevice(Message):
    """Handles and objects that are held of one RDMA device."""

    device: str
    handles: int = 0
    objects: int = 0
    handle_limit: int | None = None
    object_limit: int | None = None


class Stall(Message):
    """Pressure: the share of time in per cent, over 10, 60 and 300 seconds, and all of it in nanoseconds."""

    avg10: float = 0
    avg60: float = 0
    avg300: float = 0
    total: int = 0


class Pressure(Message):
    """How long processes waited for a resource: `some` of them, or all that could have run (`full`)."""

    some: Stall
    full: Stall | None = None


class ContainerMetrics(Message):
    """One container's figures, read at `at`. Counters begin with its task and never fall."""

    namespace: str
    container_id: str
    pid: int
    """Its first process: another one is another task, whose counters begin anew."""
    at: datetime
    clock: int
    """The node's monotonic clock when the CPU time was read, in nanoseconds: rates are differences of it."""
    cgroups: CgroupMode
    versions: dict[str, int] = {}
    """Of each section that is there (`cpu`, `memory`, …), the version (1 or 2) of the cgroups it comes from."""
    cpu: CpuMetrics | None = None
    memory: MemoryMetrics | None = None
    pids: PidsMetrics | None = None
    blkio: BlockMetrics | None = None
    hugetlb: list[HugePages] = []
    rdma: list[RdmaDevice] = []
    pressure: dict[str, Pressure] = {}
    """By resource (`cpu`, `memory`, `io`), where there is cgroup v2 and the kernel has pressure stall information."""


class ListMetrics(Filter, Request):
    """Filters are on `id` and `namespace`. `raw` false leaves out the kernel's own maps and lists: most of it.

    `stopped` asks for tasks that have stopped, too, whose cgroups are there until they are deleted.
    """

    raw: bool = True
    stopped: bool = False


TASK_METRICS = StreamVerb(
    "runtime",
    "task",
    "metrics",
    ListMetrics,
    ContainerMetrics,
    behaviour=behaves("What each task of the namespace uses; of those that have stopped, where they are asked for."),
)
NODE_METRICS = StreamVerb(
    "runtime",
    "node",
    "metrics",
    ListMetrics,
    ContainerMetrics,
    behaviour=behaves(
        "What each task of every namespace uses; of those that have stopped, where they are asked for.", whole_node=True
    ),
)
