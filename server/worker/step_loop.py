"""One step: schedule, run, postprocess. Synchronous, one thread, no sockets.

loop.add(request)        # its events go to request.emit
while loop.has_work:
    loop.step()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from models.tokenizer import IncrementalDecoder, Tokenizer
from server.errors import InvalidRequest
from server.worker.grammar import GrammarState
from server.worker.messages import (
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptScored,
    SamplingParams,
    Scheduled,
    TokenLogprob,
    Usage,
)
from server.worker.output import OutputStream
from server.worker.runner import Runner, StepItem
from server.worker.sampler import SamplerState, sample
from server.worker.scheduler import Batch, ScheduledSequence, Scheduler, SequenceRejected
from server.worker.scores import describe, raw_logprobs
from server.worker.sequence import Sequence as TokenSequence
from server.worker.sight import ImageInput, ImageQueue, LoadedAdapter
from server.worker.tool_calls import ToolCallEvents

log = logging.getLogger(__name__)

_NOT_FINITE = "The model gave logits that are not finite; check the adapter's weights."


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as the step loop wants it: tokens instead of text, pixels instead of files."""

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...]
    adapter: LoadedAdapter | None = None
    image: ImageInput | None = None
    grammar: GrammarState | None = None
    continues_text: bool = False  # the answer goes on where the prompt ends, its leading space included
    ready_at: float = field(default_factory=time.monotonic)  # from when on it waits

    @property
    def cache_key(self) -> Hashable:
        """All that keys and values depend on besides the tokens."""
        return (self.adapter.key if self.adapter else None, self.image.key if self.image else None)


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request on its way through the steps. `emit` takes its events; it must not block."""

    prepared: Prepared
    emit: Callable[[Event], None]
    seq: TokenSequence
    sampler: SamplerState
    output: OutputStream
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    queued: bool = True


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A sampled token; `finite` is False where the logits were not."""

    request: ActiveRequest
    token: int
    finite: bool
    logprob: TokenLogprob | None


class StepLoop:
    def __init__(
        self, runner: Runner, scheduler: Scheduler, tokenizer: Tokenizer, overlap: bool = False
    ) -> None:
        """`overlap`: the text of a step's tokens is made while the device computes the next step."""
        self.runner = runner
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._requests: dict[str, ActiveRequest] = {}
        self._images = ImageQueue(runner.sight)
        self._eos_ids = tuple(sorted(tokenizer.eos_ids))
        self._overlap = overlap
        self._untold: list[_Drawn] = []
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, prepared: Prepared, emit: Callable[[Event], None]) -> None:
        """Queue a request. Raises `SequenceRejected` for one that can never run."""
        params = prepared.sampling
        seq = TokenSequence(
            prepared.request_id,
            list(prepared.token_ids),
            max_tokens=prepared.max_tokens,
            adapter_id=prepared.adapter.key if prepared.adapter else None,
            cache_key=prepared.cache_key,
            skip_prefix_lookup=params.prompt_logprobs is not None,
        )
        self._queue(prepared, seq)
        if params.grammar is not None and params.grammar.tools:
            emit = ToolCallEvents(emit)
        self._requests[prepared.request_id] = ActiveRequest(
            prepared,
            emit,
            seq,
            SamplerState(
                params,
                self.runner.base.config.vocab_size,
                self._eos_ids,
                prepared.token_ids,
                prepared.grammar,
            ),
            OutputStream(
                IncrementalDecoder(self._tokenizer, continuation=prepared.continues_text), prepared.stop
            ),
        )

    def _queue(self, prepared: Prepared, seq: TokenSequence) -> None:
        """To the scheduler, or first to those whose images are still to be encoded."""
        if prepared.request_id in self._requests:
            raise SequenceRejected(f"a request {prepared.request_id!r} is running already; choose another id")
        loaded, image = prepared.adapter, prepared.image
        if loaded is None or image is None or self.runner.has_seen(loaded, image):
            self._scheduler.add(seq)
            return
        self._scheduler.check_fits(seq.num_prompt_tokens, seq.max_tokens)
        self._images.put(prepared.request_id, loaded, image)

    def abort(self, request_id: str) -> None:
        """End a request, if it still runs; its blocks are free before the next step."""
        if self._requests.pop(request_id, None):
            self._images.remove(request_id)
            self._scheduler.abort(request_id)

    def forget(self, adapter_key: tuple[str, int]) -> None:
        """Drop all that was cached for one version of an adapter; nothing of it may be running."""
        self.runner.forget(adapter_key)
        self._scheduler.forget(lambda key: isinstance(key, tuple) and key[0] == adapter_key)

    def step(self, deliver: Callable[[], None] = lambda: None) -> None:
        """`deliver` is called within the step, once what was emitted need not wait for its end."""
        began = time.perf_counter()
        self._encode_images()
        if not self._scheduler.has_work:
            return
        encoded = time.perf_counter()
        batch = self._scheduler.schedule(spent=encoded - began)
        self._compute(batch, deliver)
        if self._scheduler.pace is not None:
            num_prompt_tokens = batch.num_tokens - batch.num_decodes
            self._scheduler.pace.observe(batch.num_decodes, num_prompt_tokens, time.perf_counter() - encoded)

    def _encode_images(self) -> None:
        """As much as may stand beside the decodes; whose image is done joins the scheduler's queue."""
        if not len(self._images):
            return
        pace, num_decodes = self._scheduler.pace, self._scheduler.num_decoding
        seconds = float("inf") if pace is None else pace.spare_seconds(num_decodes)
        done, failed = self._images.work(seconds)
        for request_id in done:
            self._scheduler.add(self._requests[request_id].seq)
        for request_id in failed:
            self._requests.pop(request_id).emit(_failure("The engine failed to encode this request's image."))

    def _compute(self, batch: Batch, deliver: Callable[[], None]) -> None:
        items = sorted(batch.sequences, key=lambda item: item.num_tokens != 1)
        requests = [self._requests[item.seq.request_id] for item in items]
        self._tell_scheduled(requests)
        try:
            logits_MV = self.runner.run(list(map(self._step_item, requests, items)))
            self._tell_rest()
            deliver()
            drawn = self._draw(requests, items, logits_MV)
        except Exception:
            log.exception("a step failed; its %d requests end in an error", len(items))
            self._fail(batch, "The engine failed to compute this request.")
            return
        self.num_steps += 1
        self._scheduler.postprocess(batch, {row.request.seq.request_id: row.token for row in drawn})
        for row in drawn:
            if self._overlap and self._goes_on(row):
                self._untold.append(row)
            else:
                self._advance(row)
        for request in requests:
            if self._runs(request) and request.seq.is_complete:
                self._finish(request, "length")

    def _runs(self, request: ActiveRequest) -> bool:
        """Whether it is still there: a stop string may have ended it within the step, or its client left."""
        return self._requests.get(request.prepared.request_id) is request

    def _goes_on(self, row: _Drawn) -> bool:
        """Whether the next step has the request, as far as can be told without the token's text."""
        request = row.request
        ends = row.token in self._eos_ids or request.prepared.grammar is not None
        return row.finite and not ends and not request.seq.is_complete

    def _tell_rest(self) -> None:
        rows, self._untold = self._untold, []
        for row in rows:
            self._advance(row)

    def stats(self) -> EngineStats:
        scheduler, blocks = self._scheduler, self._scheduler.blocks.stats
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._images),
            kv_blocks_total=scheduler.blocks.num_blocks,
            kv_blocks_used=blocks.used,
            prefix_cache_queries=blocks.prefix_queries,
            prefix_cache_hits=blocks.prefix_hits,
            preemptions=scheduler.num_preemptions,
            adapters_loaded=0,
            adapters_hot=len(self.runner.adapter_slots),
            prompt_slots_used=len(self.runner.prompt_slots),
            steps=self.num_steps,
        )

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        self.runner.adapter_slots.check_integrity()
        self.runner.prompt_slots.check_integrity()
        assert self._scheduler.num_sequences + len(self._images) == len(self._requests), "a request is lost"

    def _tell_scheduled(self, requests: Sequence[ActiveRequest]) -> None:
        for request in requests:
            if request.queued:
                request.queued = False
                request.emit(Scheduled(time.monotonic() - request.prepared.ready_at))

    def _step_item(self, request: ActiveRequest, item: ScheduledSequence) -> StepItem:
        end = item.start + item.num_tokens
        if self._scores_prompt(request, item):
            wants = slice(0, item.num_tokens)
        else:
            wants = slice(item.num_tokens - item.samples, item.num_tokens)
        return StepItem(
            tokens=item.seq.token_ids[item.start : end],
            start=item.start,
            block_table=item.seq.block_table,
            adapter=request.prepared.adapter,
            image=request.prepared.image,
            wants_logits=wants,
        )

    def _scores_prompt(self, request: ActiveRequest, item: ScheduledSequence) -> bool:
        wanted = request.prepared.sampling.prompt_logprobs is not None
        return wanted and len(request.prompt_logprobs) < item.seq.num_prompt_tokens

    def _draw(
        self, asked: Sequence[ActiveRequest], items: Sequence[ScheduledSequence], logits_MV: Tensor
    ) -> list[_Drawn]:
        """Score prompts, and sample the rows that want a token."""
        rows: list[int] = []
        requests: list[ActiveRequest] = []
        end = 0
        for request, item in zip(asked, items, strict=True):
            start = end
            if self._scores_prompt(request, item):
                end += item.num_tokens
                self._score_prompt(request, item, logits_MV[start:end])
            else:
                end += item.samples
            if item.samples:
                rows.append(end - 1)
                requests.append(request)
        if not requests:
            return []
        if len(rows) < len(logits_MV):
            logits_MV = logits_MV[rows]
        logprobs = raw_logprobs(logits_MV, [request.prepared.sampling for request in requests])
        tokens, finite = sample(logits_MV, [request.sampler for request in requests])
        return [
            _Drawn(request, token, ok, self._token_logprob(logprobs.get(m), token, request))
            for m, (request, token, ok) in enumerate(zip(requests, tokens, finite, strict=True))
        ]

    def _token_logprob(
        self, logprobs_V: Tensor | None, token: int, request: ActiveRequest
    ) -> TokenLogprob | None:
        if logprobs_V is None:
            return None
        num_top = request.prepared.sampling.logprobs or 0
        return describe(self._tokenizer, [token], logprobs_V[None], num_top)[0]

    def _advance(self, row: _Drawn) -> None:
        """One generated token: show it, or end the request."""
        request, grammar = row.request, row.request.prepared.grammar
        if not self._runs(request):
            return
        if not row.finite:
            self._refuse(request, _NOT_FINITE)
        elif grammar is not None and grammar.error:
            self._break_off(request, grammar)
        elif row.token in self._eos_ids and not request.prepared.sampling.ignore_eos:
            if request.prepared.sampling.prompt_logprobs is not None:
                request.output.push(row.token, row.logprob)  # who scores a prompt counts on every token
            self._finish(request, "stop")
        else:
            delta = request.output.push(row.token, row.logprob)
            if delta is not None:
                request.emit(delta)
            if request.output.stopped or (grammar is not None and grammar.is_complete):
                self._finish(request, "stop")

    def _finish(self, request: ActiveRequest, reason: FinishReason) -> None:
        seq = request.seq
        if not request.output.stopped:
            delta = request.output.finish()
            if delta is not None:
                request.emit(delta)
            reason = "stop" if request.output.stopped else reason
        usage = Usage(
            prompt_tokens=seq.num_prompt_tokens,
            completion_tokens=len(seq) - seq.num_prompt_tokens,
            cached_tokens=seq.num_cached_tokens,
        )
        request.emit(Finished(reason, usage))
        self._drop(request)

    def _refuse(self, request: ActiveRequest, message: str) -> None:
        request.emit(_failure(message))
        self._drop(request)

    def _break_off(self, request: ActiveRequest, grammar: GrammarState) -> None:
        message = f"The grammar could not be followed to the end; simplify it: {grammar.error}"
        error = InvalidRequest(message, param=grammar.param, code="grammar_too_complex")
        request.emit(Failed(error.status, error.message, error.type, error.code, error.param))
        self._drop(request)

    def _drop(self, request: ActiveRequest) -> None:
        del self._requests[request.seq.request_id]
        self._scheduler.finish(request.seq.request_id)

    def _fail(self, batch: Batch, message: str) -> None:
        self._tell_rest()
        for item in batch.sequences:
            request = self._requests.get(item.seq.request_id)
            if request is not None:
                self._refuse(request, message)
        self._scheduler.discard(batch)

    def fail_all(self, status: int, message: str) -> None:
        """End every request with an error, such as at shutdown."""
        self._tell_rest()
        for request in list(self._requests.values()):
            request.emit(Failed(status, message, "server_error", "unavailable"))
            self.abort(request.seq.request_id)

    def _score_prompt(self, request: ActiveRequest, item: ScheduledSequence, logits_TV: Tensor) -> None:
        """The prompt's own log-probabilities: row t of the chunk foretells position start + t + 1."""
        seq, params = item.seq, request.prepared.sampling
        assert params.prompt_logprobs is not None
        if not request.prompt_logprobs:
            first = seq.token_ids[0]
            request.prompt_logprobs.append(TokenLogprob(first, self._tokenizer.token_text(first), None))
        # After a preemption, what was scored already is computed once more and left alone here.
        known = len(request.prompt_logprobs)
        targets = range(
            max(item.start + 1, known), min(item.start + item.num_tokens + 1, seq.num_prompt_tokens)
        )
        if targets:
            rows = logits_TV[targets.start - item.start - 1 : targets.stop - item.start - 1]
            tokens = seq.token_ids[targets.start : targets.stop]
            if not rows.amax(-1).isfinite().all():
                self._refuse(request, _NOT_FINITE)
                return
            request.prompt_logprobs += describe(
                self._tokenizer, tokens, rows.log_softmax(-1), params.prompt_logprobs
            )
        if len(request.prompt_logprobs) == seq.num_prompt_tokens:
            text = self._tokenizer.decode(seq.token_ids[: seq.num_prompt_tokens])
            request.emit(PromptScored(tuple(request.prompt_logprobs), text))


def _failure(message: str) -> Failed:
    return Failed(status=500, message=message, error_type="server_error", code="internal_error")
