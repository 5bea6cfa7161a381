"""The Prometheus metrics that worker and gateway share, with the names that dashboards of this field know.

One registry per app. Labels carry a model's id, never a request's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.worker.messages import Delta, EngineStats, Event, Finished, Scheduled, Started

PREFIX = "llama_adapter:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_QUEUE_BUCKETS = (0.001, 0.0025, 0.005, *FIRST_TOKEN_BUCKETS)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LENGTH_BUCKETS = (1, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)

EngineRow = tuple[tuple[str, ...], EngineStats]  # label values, the engine's snapshot


class RequestMetrics:
    """Tokens, ends and latencies by model; what `observe` gives counts one generation's events."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens accepted", "model")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated", "model")
        self.successes = self._counter(
            "request_success", "Generations that ended by themselves", "model", "finished_reason"
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From a worker's queue to its first step", _QUEUE_BUCKETS
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first text", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of text", _TOKEN_BUCKETS
        )
        self.whole_request = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last event", _REQUEST_BUCKETS
        )
        self.prompt_length = self._histogram(
            "request_prompt_tokens", "Tokens of a prompt that was accepted", _LENGTH_BUCKETS
        )
        self.answer_length = self._histogram(
            "request_generation_tokens", "Tokens of an answer that ended by itself", _LENGTH_BUCKETS
        )

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help_, labels, registry=self._registry)

    def _histogram(self, name: str, help_: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, help_, ("model",), registry=self._registry, buckets=buckets)

    def observe(self, model: str, arrived: float | None = None) -> GenerationObserver:
        """For one generation, of a request that arrived at `arrived` of the monotonic clock (None: now)."""
        return GenerationObserver(self, model, time.monotonic() if arrived is None else arrived)


class GenerationObserver:
    """Sees one generation's events. A model's id becomes a label only once a worker has accepted it."""

    def __init__(self, metrics: RequestMetrics, model: str, arrived: float) -> None:
        self._metrics = metrics
        self._model = model
        self._arrived = arrived
        self._last_text: float | None = None
        self._counted = 0

    def see(self, event: Event) -> None:
        match event:
            case Started():
                self._metrics.prompt_tokens.labels(self._model).inc(event.prompt_tokens)
                self._metrics.prompt_length.labels(self._model).observe(event.prompt_tokens)
            case Scheduled():
                self._metrics.queue_time.labels(self._model).observe(event.queued_seconds)
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
        self._metrics.answer_length.labels(self._model).observe(finished.usage.completion_tokens)
        self._metrics.whole_request.labels(self._model).observe(time.monotonic() - self._arrived)


def watch_process(registry: CollectorRegistry) -> None:
    """Its version, the usual `process_*` (memory, CPU, files), and the tasks on the event loop that scrapes:
    one of these that grows while nothing runs is a leak.
    """
    ProcessCollector(registry=registry)
    build = Gauge(PREFIX + "build_info", "1, with the version as a label", ("version",), registry=registry)
    build.labels(version("llama-adapter-server")).set(1)
    gauge = Gauge(PREFIX + "event_loop_tasks", "Tasks on this process's event loop", registry=registry)
    gauge.set_function(_tasks)


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # asked from outside any loop
        return 0


def _kv_usage(stats: EngineStats) -> float:
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0


_Reading = tuple[str, str, Callable[[EngineStats], float]]
_GAUGES: tuple[_Reading, ...] = (
    ("num_requests_running", "Requests in the running batch", lambda s: s.running),
    ("num_requests_waiting", "Requests waiting for room", lambda s: s.waiting),
    ("kv_cache_usage_perc", "Used share of the KV cache, 0 to 1", _kv_usage),
    ("adapters_loaded", "Adapters that can be named", lambda s: s.adapters_loaded),
    ("adapters_hot", "Adapters in the bank", lambda s: s.adapters_hot),
    ("prompt_slots_used", "Adapter prompts kept", lambda s: s.prompt_slots_used),
)
_COUNTERS: tuple[_Reading, ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up", lambda s: s.prefix_cache_queries),
    ("prefix_cache_hits", "Prompt tokens found", lambda s: s.prefix_cache_hits),
    ("num_preemptions", "Requests set back for room", lambda s: s.preemptions),
    ("engine_steps", "Steps of the engine", lambda s: s.steps),
)


class EngineCollector(Collector):
    """What engines count themselves, read at scrape time. `labels` name the values in `rows`' tuples."""

    def __init__(self, labels: tuple[str, ...], rows: Callable[[], Iterable[EngineRow]]) -> None:
        self._labels = labels
        self._rows = rows

    def collect(self) -> Iterable[Metric]:
        rows = list(self._rows())
        for name, help_, value in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, help_, labels=self._labels)
            for labels, stats in rows:
                gauge.add_metric(labels, value(stats))
            yield gauge
        for name, help_, value in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, help_, labels=self._labels)
            for labels, stats in rows:
                counter.add_metric(labels, value(stats))
            yield counter
