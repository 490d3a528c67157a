"""The figures of many containers at once, for whoever draws tables or scrapes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

import structlog
from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.filters import Field, compile_filters

from shoal_runtime.metrics.places import Hierarchies, Places
from shoal_runtime.metrics.reading import Job, find, hierarchies, measure

log = structlog.get_logger(__name__)

_BATCH = 16
"""Containers read in one go on a thread: some ten milliseconds, in which others can be served."""

_JOBS = """
SELECT namespace, id, request_id, pid, bundle, status = 'stopped' FROM tasks
WHERE exec_id = '' AND status NOT IN ('creating', :left_out) AND pid > 0 AND :namespace IN ('', namespace)
ORDER BY namespace, id
"""


class Metrics:
    """What the tasks use that are there: created, running or paused, and stopped ones until they are deleted."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._mounted = Hierarchies()
        self._places: dict[Job, Places] = {}

    async def of_tasks(self, ctx: Context, request: api.ListMetrics) -> AsyncIterator[api.ContainerMetrics]:
        """Those of the caller's namespace, by id."""
        async for item in self._of(self._jobs(request.stopped, ctx.namespace), request):
            yield item

    async def of_node(self, ctx: Context, request: api.ListMetrics) -> AsyncIterator[api.ContainerMetrics]:
        """Those of every namespace, by namespace and id."""
        async for item in self._of(self._jobs(request.stopped), request):
            yield item

    def _jobs(self, stopped: bool, namespace: str = "") -> list[Job]:
        asked = {"namespace": namespace, "left_out": "creating" if stopped else "stopped"}
        jobs = [Job(*row) for row in self._db.read(_JOBS, asked)]
        for gone in self._places.keys() - set(jobs):
            if namespace in ("", gone.namespace):
                self._places.pop(gone, None)
        return jobs

    async def _of(self, jobs: Iterable[Job], request: api.ListMetrics) -> AsyncIterator[api.ContainerMetrics]:
        matches = compile_filters(request.filters)
        wanted = [job for job in jobs if matches(_fields(job))]
        for start in range(0, len(wanted), _BATCH):
            for item in await asyncio.to_thread(self._read, wanted[start : start + _BATCH], request.raw):
                yield item

    def _read(self, jobs: Sequence[Job], raw: bool) -> list[api.ContainerMetrics]:
        found = []
        for job in jobs:
            places = self._places_of(job)
            if places and (item := measure(job, places, raw=raw)) is not None:
                found.append(item)
        return found

    def _places_of(self, job: Job) -> Places | None:
        """Looked up once for each task: a container's cgroups stay where they are."""
        if (places := self._places.get(job)) is None and (places := self._find(job)) is not None:
            self._places[job] = places
            if not places:
                log.warning("metrics.no_cgroup", namespace=job.namespace, container=job.id, pid=job.pid)
        return places

    def _find(self, job: Job) -> Places | None:
        places = find(job, self._mounted)
        if places is not None and not places:
            self._mounted = hierarchies()  # mounted since, perhaps
            places = find(job, self._mounted)
        return places


def _fields(job: Job) -> Field:
    def field(path: Sequence[str]) -> str | None:
        match list(path):
            case ["id" | "container_id"]:
                return job.id
            case ["namespace"]:
                return job.namespace
        return None

    return field
