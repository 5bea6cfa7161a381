"""The gateway's Prometheus metrics: one registry per app, never a request's id in a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.metrics import (
    FIRST_TOKEN_BUCKETS,
    PREFIX,
    EngineCollector,
    GenerationObserver,
    RequestMetrics,
    watch_event_loop,
)
from server.worker.messages import EngineStats

WorkerStats = tuple[str, str, EngineStats | None]  # the worker's URL, its base's id, None: not ready


class GatewayMetrics:
    def __init__(self, workers: Callable[[], Iterable[WorkerStats]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ReadinessCollector(workers))
        self._registry.register(
            EngineCollector(
                ("model", "worker"),
                lambda: [((base, url), stats) for url, base, stats in workers() if stats is not None],
            )
        )
        self._requests = RequestMetrics(self._registry)
        watch_event_loop(self._registry)
        self.http_requests = Counter(
            PREFIX + "http_requests", "Answers given", ("route", "status"), registry=self._registry
        )
        self.experts = Histogram(
            PREFIX + "expert_latency_seconds",
            "An expert's reading of one image, for a request to this model",
            ("model", "expert", "outcome"),
            registry=self._registry,
            buckets=FIRST_TOKEN_BUCKETS,
        )
        self.open_circuits = Gauge(
            PREFIX + "expert_circuit_open",
            "1 while the expert is left alone after failures",
            ("expert",),
            registry=self._registry,
        )

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def observe(self, model: str, arrived: float) -> GenerationObserver:
        """For one choice of a request that arrived at `arrived` of the monotonic clock."""
        return self._requests.observe(model, arrived)


class _ReadinessCollector(Collector):
    def __init__(self, workers: Callable[[], Iterable[WorkerStats]]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            PREFIX + "worker_ready", "1 while the worker takes requests", labels=["worker"]
        )
        for url, _, stats in self._workers():
            family.add_metric([url], stats is not None)
        yield family
