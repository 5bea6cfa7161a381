"""The worker's Prometheus metrics: its engine's numbers, and its requests as their events leave it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest

from server.metrics import EngineCollector, GenerationObserver, RequestMetrics, watch_process
from server.worker.messages import EngineStats


class WorkerMetrics:
    def __init__(self, base: str, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(("model",), lambda: [((base,), stats())]))
        self._requests = RequestMetrics(self._registry)
        watch_process(self._registry)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def observe(self, model: str) -> GenerationObserver:
        return self._requests.observe(model)
