"""One generation's spans: queue, prefill, decode. Read off its events, as they leave the worker."""

from __future__ import annotations

import time

from opentelemetry import context, trace
from opentelemetry.trace import Span

from server.tracing import tracer
from server.worker.messages import Delta, Event, Finished, GenerateRequest, PromptScored, Scheduled, Started


class GenerationTrace:
    """Children of the span that is current when it is made.

    queue    the prompt is ready → its first step begins
    prefill  → the first text leaves, or the prompt's scores
    decode   → the end
    """

    def __init__(self, request: GenerateRequest) -> None:
        self._context = context.get_current()
        self._whole = trace.get_current_span()
        self._whole.set_attribute("gen_ai.request.model", request.model)
        self._whole.set_attribute("generation.id", request.request_id)
        self._part: Span | None = None  # the one under way
        self._ready_ns = 0
        self._decoding = False

    def see(self, event: Event) -> None:
        match event:
            case Started():
                self._ready_ns = time.time_ns()
                self._whole.set_attribute("gen_ai.usage.input_tokens", event.prompt_tokens)
                self._begin("queue", self._ready_ns)
            case Scheduled():
                self._begin("prefill", self._ready_ns + int(event.queued_seconds * 1e9))
            case PromptScored(more=False) | Delta() if not self._decoding:
                self._decoding = True
                self._begin("decode", time.time_ns())
            case Finished():
                self._see_end(event)

    def close(self) -> None:
        """The generation has ended, however it did. Repeating it does nothing."""
        self._end(time.time_ns())

    def _see_end(self, finished: Finished) -> None:
        usage = finished.usage
        if self._part is not None:
            self._part.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        self._whole.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        self._whole.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
        self._whole.set_attribute("gen_ai.response.finish_reasons", [finished.finish_reason])
        self.close()

    def _begin(self, name: str, at_ns: int) -> None:
        self._end(at_ns)
        self._part = tracer().start_span(name, self._context, start_time=at_ns)

    def _end(self, at_ns: int) -> None:
        if self._part is not None:
            self._part.end(at_ns)
        self._part = None
