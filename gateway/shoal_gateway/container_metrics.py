"""What the node's containers use, as Prometheus has it: base units, counters in `_total`, a series for each container.

A figure that a container doesn't have (a limit that isn't set, a controller that isn't there) has no series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from shoal_bus.api.runtime import ContainerMetrics

_NANOSECOND = 1e-9
_LABELS = ("node", "namespace", "container")

_Samples = Iterator[tuple[Sequence[str], float | None]]
"""The values of further labels, and the figure."""
_Reading = tuple[str, str, Sequence[str], Callable[[ContainerMetrics], _Samples]]
"""A metric's name, its help, its further labels, and where its figures come from."""


def _one(path: str, factor: float = 1) -> Callable[[ContainerMetrics], _Samples]:
    """The figure at `path` (`cpu.usage`), times `factor`."""
    section, _, name = path.partition(".")

    def samples(container: ContainerMetrics) -> _Samples:
        value = getattr(getattr(container, section), name, None)
        yield (), None if value is None else value * factor

    return samples


def _devices(name: str) -> Callable[[ContainerMetrics], _Samples]:
    def samples(container: ContainerMetrics) -> _Samples:
        for device in container.blkio.devices if container.blkio is not None else ():
            yield (device.device or f"{device.major}:{device.minor}",), getattr(device, name)

    return samples


def _huge_pages(name: str) -> Callable[[ContainerMetrics], _Samples]:
    def samples(container: ContainerMetrics) -> _Samples:
        for pages in container.hugetlb:
            yield (pages.page_size,), getattr(pages, name)

    return samples


def _pressure(kind: str) -> Callable[[ContainerMetrics], _Samples]:
    def samples(container: ContainerMetrics) -> _Samples:
        for resource, pressure in container.pressure.items():
            stall = getattr(pressure, kind)
            yield (resource,), None if stall is None else stall.total * _NANOSECOND

    return samples


_READINGS: tuple[_Reading, ...] = (
    ("cpu_usage_seconds_total", "CPU time used", (), _one("cpu.usage", _NANOSECOND)),
    ("cpu_user_seconds_total", "CPU time used in user mode", (), _one("cpu.user", _NANOSECOND)),
    ("cpu_system_seconds_total", "CPU time used in the kernel", (), _one("cpu.system", _NANOSECOND)),
    ("cpu_limit", "CPUs that may be used at most", (), _one("cpu.limit")),
    ("cpu_periods_total", "Periods of the CPU limit", (), _one("cpu.periods")),
    ("cpu_throttled_periods_total", "Periods the CPU limit cut short", (), _one("cpu.throttled_periods")),
    ("cpu_throttled_seconds_total", "Time held back by the CPU limit", (), _one("cpu.throttled", _NANOSECOND)),
    ("memory_usage_bytes", "Memory in use, page cache included", (), _one("memory.usage")),
    ("memory_working_set_bytes", "Memory that can't be taken back easily", (), _one("memory.working_set")),
    ("memory_peak_bytes", "The most memory there has been in use", (), _one("memory.peak")),
    ("memory_limit_bytes", "Memory that may be used at most", (), _one("memory.limit")),
    ("memory_anon_bytes", "Anonymous memory", (), _one("memory.anon")),
    ("memory_file_bytes", "Page cache", (), _one("memory.file")),
    ("memory_swap_bytes", "Memory that is swapped out", (), _one("memory.swapped")),
    ("memory_limit_hits_total", "How often the memory limit was reached", (), _one("memory.limit_hits")),
    ("memory_oom_kills_total", "Processes killed for the memory limit", (), _one("memory.oom_kills")),
    ("pids", "Processes and threads", (), _one("pids.current")),
    ("pids_limit", "Processes and threads there may be at most", (), _one("pids.limit")),
    ("pids_limit_hits_total", "Forks that the limit refused", (), _one("pids.limit_hits")),
    ("blkio_read_bytes_total", "Bytes read from a block device", ("device",), _devices("read_bytes")),
    ("blkio_written_bytes_total", "Bytes written to a block device", ("device",), _devices("write_bytes")),
    ("blkio_reads_total", "Reads from a block device", ("device",), _devices("reads")),
    ("blkio_writes_total", "Writes to a block device", ("device",), _devices("writes")),
    ("hugetlb_usage_bytes", "Huge pages in use", ("page_size",), _huge_pages("usage")),
    ("hugetlb_limit_bytes", "Huge pages that may be used at most", ("page_size",), _huge_pages("limit")),
    ("hugetlb_limit_hits_total", "How often that limit was reached", ("page_size",), _huge_pages("limit_hits")),
    ("pressure_waiting_seconds_total", "Time some process waited for it", ("resource",), _pressure("some")),
    ("pressure_stalled_seconds_total", "Time no process could run for want of it", ("resource",), _pressure("full")),
)


class ContainersCollector(Collector):
    """The figures of a node's containers; None for those of a node whose runtime service doesn't answer."""

    def __init__(self, node: str, containers: Sequence[ContainerMetrics] | None) -> None:
        self._node, self._containers = node, containers

    def collect(self) -> Iterator[Metric]:
        available = GaugeMetricFamily(
            "shoal_container_metrics_available", "1 when the runtime service told its containers' figures",
            labels=["node"],
        )  # fmt: skip
        available.add_metric([self._node], self._containers is not None)
        yield available
        for name, help, further, samples in _READINGS:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"shoal_container_{name}", help, labels=[*_LABELS, *further])
            for container in self._containers or ():
                labels = [self._node, container.namespace, container.container_id]
                for values, figure in samples(container):
                    if figure is not None:
                        family.add_metric([*labels, *values], figure)
            yield family
