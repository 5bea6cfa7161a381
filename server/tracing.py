"""OpenTelemetry traces, off unless the environment names a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`).

FastAPI makes the span of each request, a child of what its W3C `traceparent` names; ours are its parts.
Every other variable of OpenTelemetry's own (headers, sampler, batch sizes, service name) counts too.
"""

from __future__ import annotations

import os
from collections.abc import Generator, MutableMapping
from contextlib import contextmanager
from typing import Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace import Span, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.serving import StartupError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROPAGATOR = TraceContextTextMapPropagator()


def _only_looks(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("method") in ("GET", "HEAD")


# For FastAPI: a span for what does work, none for the polls of every second.
TELEMETRY: TelemetryConfig = {
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "exclude": _only_looks,
}


def configure_tracing(service: str) -> None:
    """Send this process's spans to the collector that the environment names, if it names one.

    Raises `StartupError` where it does and the exporter is not installed.
    """
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise StartupError(
            f"{endpoint} is set, but {error.name} is not installed; install llama-adapter-server[otel]."
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)  # the process's own; it sends what it still has at exit


def tracer() -> Tracer:
    return trace.get_tracer("llama-adapter-server")


@contextmanager
def span(name: str, **attributes: str | int) -> Generator[Span, None, None]:
    """A piece of the current request's work, the parent of what is begun within."""
    with tracer().start_as_current_span(name, attributes=attributes) as current:
        yield current


def inject(headers: MutableMapping[str, str]) -> None:
    """Add the current `traceparent`."""
    _PROPAGATOR.inject(headers)
