"""The gateway's Prometheus metrics: one registry per app, never a request's id in a label."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.worker.messages import Delta, EngineStats, Event, Finished, Started

PREFIX = "llama_adapter:"
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

WorkerStats = tuple[str, str, EngineStats]  # the worker's name, its base's id, its last snapshot


class GatewayMetrics:
    def __init__(self, workers: Callable[[], Iterable[WorkerStats]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(workers))
        self.http_requests = self._counter("http_requests", "Answers given", "route", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens accepted", "model")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated", "model")
        self.successes = self._counter(
            "request_success", "Choices that ended by themselves", "model", "finished_reason"
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the request's arrival to its first text",
            _FIRST_TOKEN_BUCKETS,
            "model",
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of text", _TOKEN_BUCKETS, "model"
        )
        self.whole_request = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its end", _REQUEST_BUCKETS, "model"
        )
        self.experts = self._histogram(
            "expert_latency_seconds",
            "An expert's reading of one image",
            _FIRST_TOKEN_BUCKETS,
            "expert",
            "outcome",
        )

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help_, labels, registry=self._registry)

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(PREFIX + name, help_, labels, registry=self._registry, buckets=buckets)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def observe(self, model: str, arrived: float) -> ChoiceObserver:
        """For one choice of a request that arrived at `arrived` of the monotonic clock."""
        return ChoiceObserver(self, model, arrived)


class ChoiceObserver:
    """Sees one choice's events. A model's id becomes a label only once a worker has accepted it."""

    def __init__(self, metrics: GatewayMetrics, model: str, arrived: float) -> None:
        self._metrics = metrics
        self._model = model
        self._arrived = arrived
        self._last_text: float | None = None
        self._counted = 0

    def see(self, event: Event) -> None:
        match event:
            case Started():
                self._metrics.prompt_tokens.labels(self._model).inc(event.prompt_tokens)
            case Delta():
                self._see_text(event)
            case Finished():
                self._see_end(event)

    def _see_text(self, delta: Delta) -> None:
        now = time.monotonic()
        if self._last_text is None:
            self._metrics.first_token.labels(self._model).observe(now - self._arrived)
        else:
            self._metrics.inter_token.labels(self._model).observe(now - self._last_text)
        self._last_text = now
        self._counted += len(delta.token_ids)
        self._metrics.generation_tokens.labels(self._model).inc(len(delta.token_ids))

    def _see_end(self, finished: Finished) -> None:
        # The stop token and text held back to the end are in no delta.
        uncounted = max(0, finished.usage.completion_tokens - self._counted)
        self._metrics.generation_tokens.labels(self._model).inc(uncounted)
        self._metrics.successes.labels(self._model, finished.finish_reason).inc()
        self._metrics.whole_request.labels(self._model).observe(time.monotonic() - self._arrived)


class _EngineCollector(Collector):
    """The workers' own numbers, as they were last polled."""

    def __init__(self, workers: Callable[[], Iterable[WorkerStats]]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        known = list(self._workers())
        yield self._gauge(known, "num_requests_running", "Requests in the running batch", lambda s: s.running)
        yield self._gauge(known, "num_requests_waiting", "Requests waiting for room", lambda s: s.waiting)
        yield self._gauge(known, "kv_cache_usage_perc", "Used share of the KV cache, 0 to 1", _kv_usage)
        yield self._counter(
            known, "prefix_cache_queries", "Prompt tokens looked up", lambda s: s.prefix_cache_queries
        )
        yield self._counter(known, "prefix_cache_hits", "Prompt tokens found", lambda s: s.prefix_cache_hits)
        yield self._counter(known, "num_preemptions", "Requests set back for room", lambda s: s.preemptions)

    def _gauge(
        self, known: list[WorkerStats], name: str, help_: str, value: Callable[[EngineStats], float]
    ) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help_, labels=["model", "worker"])
        for worker, base, stats in known:
            family.add_metric([base, worker], value(stats))
        return family

    def _counter(
        self, known: list[WorkerStats], name: str, help_: str, value: Callable[[EngineStats], float]
    ) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help_, labels=["model", "worker"])
        for worker, base, stats in known:
            family.add_metric([base, worker], value(stats))
        return family


def _kv_usage(stats: EngineStats) -> float:
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
