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
    watch_process,
)
from server.worker.messages import EngineStats

WorkerStats = tuple[str, str, EngineStats | None]  # the worker's name, its base's id, None: not ready


class GatewayMetrics:
    def __init__(self, workers: Callable[[], Iterable[WorkerStats]]) -> None:
        self._registry = CollectorRegistry()
        self._of_keys = CollectorRegistry()  # not for whoever has just any key
        self._registry.register(_ReadinessCollector(workers))
        self._registry.register(
            EngineCollector(
                ("model", "worker"),
                lambda: [((base, name), stats) for name, base, stats in workers() if stats is not None],
            )
        )
        self._requests = RequestMetrics(self._registry)
        watch_process(self._registry)
        self.http_requests = Counter(
            PREFIX + "http_requests", "Answers given", ("route", "status"), registry=self._registry
        )
        self._key_tokens = Counter(
            PREFIX + "key_tokens",
            "Tokens of prompts and answers, by the name of whose key it was",
            ("key", "model", "kind"),
            registry=self._of_keys,
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

    def render(self, of_keys: bool = True) -> bytes:
        """The Prometheus text format, with what is told of each key or without."""
        return generate_latest(self._registry) + (generate_latest(self._of_keys) if of_keys else b"")

    def observe(self, model: str, arrived: float) -> GenerationObserver:
        """For one choice of a request that arrived at `arrived` of the monotonic clock."""
        return self._requests.observe(model, arrived)

    def charge(self, key: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """What a request of the caller `key` took of a model that a worker has."""
        self._key_tokens.labels(key, model, "prompt").inc(prompt_tokens)
        self._key_tokens.labels(key, model, "completion").inc(completion_tokens)


class _ReadinessCollector(Collector):
    def __init__(self, workers: Callable[[], Iterable[WorkerStats]]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            PREFIX + "worker_ready", "1 while the worker takes requests", labels=["worker"]
        )
        for name, _, stats in self._workers():
            family.add_metric([name], stats is not None)
        yield family
