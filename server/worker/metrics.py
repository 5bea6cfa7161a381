"""The worker's Prometheus metrics, with the names that dashboards of this field know.

One registry per app. Labels carry a model's id, never a request's.
"""

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


class WorkerMetrics:
    """What the engine counts itself is read at scrape time; latencies are seen on the events' way out."""

    def __init__(self, base: str, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(base, stats))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens accepted", "model")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated", "model")
        self.successes = self._counter(
            "request_success", "Requests that ended by themselves", "model", "finished_reason"
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first text", _FIRST_TOKEN_BUCKETS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of text", _TOKEN_BUCKETS
        )
        self.whole_request = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last event", _REQUEST_BUCKETS
        )

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help_, labels, registry=self._registry)

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, help_, ("model",), registry=self._registry, buckets=buckets)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def observe(self, model: str) -> RequestObserver:
        return RequestObserver(self, model)


class RequestObserver:
    """Sees one request's events. A model's id becomes a label only once the engine has accepted it."""

    def __init__(self, metrics: WorkerMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._arrived = time.monotonic()
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
    def __init__(self, base: str, stats: Callable[[], EngineStats]) -> None:
        self._base = base
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield self._gauge("num_requests_running", "Requests in the running batch", stats.running)
        yield self._gauge("num_requests_waiting", "Requests waiting for room", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Used share of the KV cache, 0 to 1", usage)
        yield self._gauge("adapters_loaded", "Adapters that can be named", stats.adapters_loaded)
        yield self._gauge("adapters_hot", "Adapters in the bank", stats.adapters_hot)
        yield self._gauge("prompt_slots_used", "Adapter prompts kept", stats.prompt_slots_used)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_cache_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found", stats.prefix_cache_hits)
        yield self._counter("num_preemptions", "Requests set back for room", stats.preemptions)
        yield self._counter("engine_steps", "Steps of the engine", stats.steps)

    def _gauge(self, name: str, help_: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help_, labels=["model"])
        family.add_metric([self._base], value)
        return family

    def _counter(self, name: str, help_: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help_, labels=["model"])
        family.add_metric([self._base], value)
        return family
