"""One container's figures, from wherever its cgroups are. Reads some thirty files: it belongs on a thread."""

from __future__ import annotations

import json
import os
import time
from typing import NamedTuple

from shoal_bus.api.runtime import ContainerMetrics
from shoal_bus.message import now

from shoal_runtime.bundles import CONFIG
from shoal_runtime.metrics import files, shared, v1, v2
from shoal_runtime.metrics.places import Hierarchies, Places, own_cgroup

_SECTIONS = ("memory", "pids", "blkio", "hugetlb", "rdma")


class Job(NamedTuple):
    """A task whose figures are wanted."""

    namespace: str
    id: str
    request_id: str
    """Of the request that made it: a later task of this container has another one."""
    pid: int
    bundle: str
    stopped: bool = False


def hierarchies() -> Hierarchies:
    """The machine's, as they are mounted now."""
    return Hierarchies.parse(files.read("/proc/self", "mountinfo") or "")


def find(job: Job, mounted: Hierarchies) -> Places | None:
    """Where a task's cgroups are, empty where it has none of its own; None when its process has gone.

    Those of one that has stopped are where its specification has them from the root on; a pid says nothing any more.
    """
    config = files.read(job.bundle, CONFIG)
    path = "" if config is None else str((json.loads(config).get("linux") or {}).get("cgroupsPath") or "")
    if job.stopped:
        membership = mounted.membership(path) if path.startswith("/") else None
    else:
        membership = files.read(f"/proc/{job.pid}", "cgroup")
    if membership is None or config is None:
        return None
    return mounted.places(membership, own_cgroup(path, job.id))


def measure(job: Job, places: Places, *, raw: bool = True) -> ContainerMetrics | None:
    """A task's figures; None when its cgroups have gone, or are just going."""
    legacy, unified = places.v1, places.v2
    found = ContainerMetrics(
        namespace=job.namespace, container_id=job.id, pid=job.pid, at=now(), clock=time.monotonic_ns(),
        cgroups=places.mode,
    )  # fmt: skip
    if "cpuacct" in legacy:
        found.cpu = v1.cpu(legacy["cpuacct"], legacy.get("cpu", ""), raw=raw)
    else:
        found.cpu = v2.cpu(unified, raw=raw)
    found.memory = v1.memory(legacy["memory"], raw=raw) if "memory" in legacy else v2.memory(unified, raw=raw)
    found.pids = shared.pids(legacy.get("pids", unified))
    found.blkio = v1.blkio(legacy["blkio"], raw=raw) if "blkio" in legacy else v2.blkio(unified)
    sizes = shared.huge_page_sizes()
    found.hugetlb = v1.hugetlb(legacy["hugetlb"], sizes) if "hugetlb" in legacy else v2.hugetlb(unified, sizes)
    found.rdma = shared.rdma(legacy.get("rdma", unified))
    found.pressure = v2.pressure(unified)
    found.versions = {name: 1 if name in legacy else 2 for name in _SECTIONS if getattr(found, name)}
    if found.cpu is not None:
        found.versions["cpu"] = 1 if "cpuacct" in legacy else 2
    # Checked behind the reading: what was read of a cgroup that has gone meanwhile may be half of it.
    return found if all(map(os.path.isdir, places.directories())) else None
