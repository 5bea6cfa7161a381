"""OpenTelemetry traces, off unless the environment names a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`).

Off, spans cost next to nothing and the caller's W3C context (`traceparent`) is passed on all the same.
Every other variable of OpenTelemetry's own (headers, sampler, batch sizes, service name) counts too.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, MutableMapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.serving import StartupError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROPAGATOR = TraceContextTextMapPropagator()


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


@contextmanager
def server_span(name: str, headers: Mapping[str, str]) -> Generator[Span, None, None]:
    """The whole of a request, a child of what its `traceparent` names."""
    context = _PROPAGATOR.extract(headers, Context())
    with tracer().start_as_current_span(name, context, SpanKind.SERVER) as current:
        yield current


def inject(headers: MutableMapping[str, str]) -> None:
    """Add the current `traceparent`."""
    _PROPAGATOR.inject(headers)
