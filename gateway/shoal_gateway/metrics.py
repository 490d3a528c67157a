"""What the gateway counts, in Prometheus's text format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from shoal_bus.api.runtime import ContainerMetrics
from shoal_bus.discovery import ServiceStats
from shoal_bus.errors import Code

from shoal_gateway.container_metrics import ContainersCollector

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)


class Outcome:
    """How a call ended; counted and timed, in a `with`, as one call of a method."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.code = Code.OK

    def __enter__(self) -> Outcome:
        self._calls.in_flight.inc()
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self.code = Code.CANCELLED
        self._calls.in_flight.dec()
        self._calls.seconds.observe(time.perf_counter() - self._began)
        self._calls.ended(self.code).inc()


class Calls:
    """The counters of one gRPC method."""

    def __init__(self, metrics: Metrics, service: str, method: str) -> None:
        self._requests, self._labels = metrics.requests, (service, method)
        self._ended: dict[Code, Counter] = {}
        self.seconds = metrics.seconds.labels(service, method)
        self.in_flight = metrics.in_flight.labels(service, method)

    def counted(self) -> Outcome:
        """What happens inside is one call, counted by the code it ends with."""
        return Outcome(self)

    def ended(self, code: Code) -> Counter:
        """The calls that ended so."""
        if code not in self._ended:
            self._ended[code] = self._requests.labels(*self._labels, code.name)
        return self._ended[code]


class Metrics:
    """One process's counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "shoal_gateway_requests_total", "gRPC calls that ended, by code", ["service", "method", "code"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "shoal_gateway_request_seconds", "How long gRPC calls took", ["service", "method"],
            buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "shoal_gateway_requests_in_flight", "gRPC calls under way", ["service", "method"], registry=self.registry
        )
        self.forwarded = Counter(
            "shoal_gateway_events_forwarded_total", "Events sent to subscribers", registry=self.registry
        )
        self.subscribers = Gauge("shoal_gateway_event_subscribers", "Subscribers to events", registry=self.registry)
        self.tasks = Gauge("shoal_gateway_tasks", "What the gateway's event loop has under way", registry=self.registry)
        self.bus = Gauge("shoal_gateway_bus_connected", "1 while the bus is there", registry=self.registry)

    def calls(self, service: str, method: str) -> Calls:
        """The counters of one gRPC method."""
        return Calls(self, service, method)

    def render(
        self, services: Sequence[ServiceStats], node: str, containers: Sequence[ContainerMetrics] | None
    ) -> bytes:
        """Everything counted here, what the node's services say of themselves, and what its containers use."""
        described = CollectorRegistry()
        described.register(_Described(services))
        described.register(ContainersCollector(node, containers))
        return generate_latest(self.registry) + generate_latest(described)


class _Described(Collector):
    """The statistics of NATS's micro protocol as metrics."""

    def __init__(self, services: Sequence[ServiceStats]) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        labels = ["service", "instance", "endpoint"]
        requests = CounterMetricFamily("shoal_service_requests", "Requests a service's endpoint has had", labels=labels)
        errors = CounterMetricFamily("shoal_service_errors", "Requests it refused", labels=labels)
        seconds = CounterMetricFamily("shoal_service_processing_seconds", "Time it spent on them", labels=labels)
        up = GaugeMetricFamily("shoal_service_copies", "Copies of a service that answer", labels=["service"])
        for service in self._services:
            for endpoint in service.endpoints:
                at = [service.name, service.id, endpoint.name]
                requests.add_metric(at, endpoint.num_requests)
                errors.add_metric(at, endpoint.num_errors)
                seconds.add_metric(at, endpoint.processing_time / 1e9)
        for name in sorted({service.name for service in self._services}):
            up.add_metric([name], sum(service.name == name for service in self._services))
        yield from (requests, errors, seconds, up)
