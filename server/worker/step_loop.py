"""One step: schedule, run, postprocess. One thread, no sockets.

loop.add(request)        # its events go to request.emit
while loop.has_work:
    loop.step()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from models.tokenizer import IncrementalDecoder, Tokenizer
from models.uploads import upload
from server.errors import InvalidRequest
from server.worker.device import check_device
from server.worker.draws import Ahead, Drawn, draw
from server.worker.grammar import GrammarState
from server.worker.messages import (
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    Scheduled,
    Usage,
)
from server.worker.output import OutputStream
from server.worker.request import ActiveRequest, Prepared
from server.worker.runner import Runner, StepItem
from server.worker.sampler import SamplerState
from server.worker.scheduler import Batch, ScheduledSequence, Scheduler, SequenceRejected
from server.worker.scores import score_prompt
from server.worker.sequence import UNKNOWN
from server.worker.sequence import Sequence as TokenSequence
from server.worker.sight import ImageQueue
from server.worker.tool_calls import ToolCallEvents

log = logging.getLogger(__name__)

_FAILED = "The engine failed to compute this request."
NOT_FINITE = "The model gave logits that are not finite; check the adapter's weights."


class StepLoop:
    def __init__(
        self, runner: Runner, scheduler: Scheduler, tokenizer: Tokenizer, overlap: bool = False
    ) -> None:
        """`overlap`: the device computes the next step while the tokens of this one are read and told."""
        self.runner = runner
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._requests: dict[str, ActiveRequest] = {}
        self._images = ImageQueue(runner.sight)
        self._eos_ids = tuple(sorted(tokenizer.eos_ids))
        self._overlap = overlap
        self._untold: list[Drawn] = []
        self._ahead: Ahead | None = None
        self._done_at = 0.0  # when the last step was whose tokens are read
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, prepared: Prepared, emit: Callable[[Event], None]) -> None:
        """Queue a request. Raises `SequenceRejected` for one that can never run.

        Whatever is raised, nothing of the request is left.
        """
        if prepared.request_id in self._requests:
            raise SequenceRejected(f"a request {prepared.request_id!r} is running already; choose another id")
        params = prepared.sampling
        seq = TokenSequence(
            prepared.request_id,
            list(prepared.token_ids),
            max_tokens=prepared.max_tokens,
            adapter_id=prepared.adapter.key if prepared.adapter else None,
            cache_key=prepared.cache_key,
            skip_prefix_lookup=params.prompt_logprobs is not None,
        )
        if params.grammar is not None and params.grammar.tools:
            emit = ToolCallEvents(emit, params.grammar)
        vocab_size, prompt_ids = self.runner.base.config.vocab_size, prepared.token_ids
        sampler = SamplerState(params, vocab_size, self._eos_ids, prompt_ids, prepared.grammar)
        decoder = IncrementalDecoder(self._tokenizer, continuation=prepared.continues_text)
        output = OutputStream(decoder, prepared.stop, params.min_tokens)
        request = ActiveRequest(prepared, emit, seq, sampler, output)
        self._queue(prepared, seq)
        self._requests[prepared.request_id] = request

    def _queue(self, prepared: Prepared, seq: TokenSequence) -> None:
        """To the scheduler, or first to those whose images are still to be encoded."""
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
        self._drop_if_idle()

    def forget(self, adapter_key: tuple[str, int]) -> None:
        """Drop all that was cached for one version of an adapter; nothing of it may be running."""
        self.runner.forget(adapter_key)
        self._images.forget_unwanted()
        self._scheduler.forget(lambda key: isinstance(key, tuple) and key[0] == adapter_key)

    def step(self, deliver: Callable[[], None] = lambda: None) -> None:
        """`deliver` is called within the step, once what was emitted need not wait for its end.

        A failure ends the requests it concerns. One that lost the device is raised; nobody is told of it yet.
        """
        if len(self._images):
            # What is read after an encoding would wait for it, and count its time as the step's.
            self._tell_rest()
            deliver()
        began = time.perf_counter()
        self._encode_images()
        if not self._scheduler.has_work:
            return
        encoded = time.perf_counter()
        batch = self._scheduler.schedule(spent=encoded - began)
        if batch.sequences:
            self._compute(batch, deliver, encoded)
        else:  # all that is left to do is to read the last tokens
            self._tell_rest()
        if self._ahead is None:
            self._observe(batch, encoded)
        self._drop_if_idle()

    def _drop_if_idle(self) -> None:
        """Nobody waits for what is unread then, and the step that would read it may be long from now."""
        if not self._scheduler.has_work:
            self._ahead = None

    def _observe(self, batch: Batch, began: float) -> None:
        """The device is done with a step: it began then, or when the step before it was done."""
        now = time.perf_counter()
        if self._scheduler.pace is not None:
            num_prompt_tokens = batch.num_tokens - batch.num_decodes
            seconds = now - max(began, self._done_at)
            self._scheduler.pace.observe(batch.num_decodes, num_prompt_tokens, seconds)
        self._done_at = now

    def _encode_images(self) -> None:
        """As much as may stand beside the decodes; whose image is done joins the scheduler's queue."""
        if not len(self._images):
            return
        pace, num_decodes = self._scheduler.pace, self._scheduler.num_decoding
        seconds = float("inf") if pace is None else pace.spare_seconds(num_decodes)
        done, failed = self._images.work(seconds)
        for request_id in done:
            self._scheduler.add(self._requests[request_id].seq)
        if failed:
            check_device(self.runner.base.device)
        for request_id in failed:
            self._requests.pop(request_id).emit(_failure("The engine failed to encode this request's image."))

    def _compute(self, batch: Batch, deliver: Callable[[], None], began: float) -> None:
        items = sorted(batch.sequences, key=lambda item: item.num_tokens != 1)
        requests = [self._requests[item.seq.request_id] for item in items]
        self._tell_scheduled(requests)
        try:
            last_M = self._ahead.choice.tokens_M if self._ahead and self._ahead.rows else None
            logits_MV = self.runner.run(list(map(self._step_item, requests, items)), last_M)
            self._tell_rest()
            deliver()
            sampling, logits_MV = self._select(requests, items, logits_MV)
            drawn: list[Drawn] = []
            if self._overlap and all(request.runs_ahead for request in sampling):
                self._ahead = Ahead.draw(sampling, logits_MV, batch, began)
            else:
                drawn = draw(self._tokenizer, sampling, logits_MV)
        except Exception:
            log.exception("a step failed; its %d requests end in an error", len(items))
            check_device(self.runner.base.device)
            self._fail(batch, _FAILED)
            return
        self.num_steps += 1
        ahead = self._ahead.rows if self._ahead else {}
        tokens = {row.request.seq.request_id: row.token for row in drawn}
        self._scheduler.postprocess(batch, tokens | {own.seq.request_id: UNKNOWN for own in ahead})
        for row in drawn:
            if self._overlap and self._goes_on(row):
                self._untold.append(row)
            else:
                self._advance(row)
        for request in requests:
            if request not in ahead and self._runs(request) and request.seq.is_complete:
                self._finish(request, "length")

    def _runs(self, request: ActiveRequest) -> bool:
        """Whether it is still there: a stop string may have ended it within the step, or its client left."""
        return self._requests.get(request.prepared.request_id) is request

    def _goes_on(self, row: Drawn) -> bool:
        """Whether the next step has the request, as far as can be told without the token's text."""
        request = row.request
        ends = row.token in self._eos_ids or request.prepared.grammar is not None
        return row.finite and not ends and not request.seq.is_complete

    def _tell_rest(self) -> None:
        """What the steps before have left untold, and unread."""
        rows, self._untold = self._untold, []
        rows += self._read_ahead()
        for row in rows:
            self._advance(row)
            if self._runs(row.request) and row.request.seq.has_all_tokens:
                self._finish(row.request, "length")

    def _read_ahead(self) -> list[Drawn]:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return []
        try:
            drawn = ahead.read()
        except Exception:
            log.exception("a step failed; its requests end in an error")
            check_device(self.runner.base.device)
            self._lose(ahead.batch)
            return []
        self._observe(ahead.batch, ahead.began)
        return drawn

    def _lose(self, batch: Batch) -> None:
        """A step that was counted as done came to nothing: what it wrote must not be found in the cache."""
        keys = {item.seq.cache_key for item in batch.sequences} - {None}
        self._scheduler.forget(keys.__contains__)
        for item in batch.sequences:
            request = self._requests.get(item.seq.request_id)
            if request is not None and request.seq is item.seq:
                self._refuse(request, _FAILED)

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
        self.runner.sight.check_integrity()
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
        tokens = item.seq.token_ids[item.start : end]
        if self._ahead is not None and tokens[-1] == UNKNOWN:
            tokens = [-1 - self._ahead.rows[request]]
        return StepItem(
            tokens=tokens,
            start=item.start,
            block_table=item.seq.block_table,
            adapter=request.prepared.adapter,
            image=request.prepared.image,
            wants_logits=wants,
        )

    def _scores_prompt(self, request: ActiveRequest, item: ScheduledSequence) -> bool:
        wanted = request.prepared.sampling.prompt_logprobs is not None
        return wanted and request.num_scored < item.seq.num_prompt_tokens

    def _select(
        self, asked: Sequence[ActiveRequest], items: Sequence[ScheduledSequence], logits_MV: Tensor
    ) -> tuple[list[ActiveRequest], Tensor]:
        """Who wants a token, and the rows of logits it comes from. Prompts that are to be scored are."""
        rows: list[int] = []
        requests: list[ActiveRequest] = []
        end = 0
        for request, item in zip(asked, items, strict=True):
            start = end
            if self._scores_prompt(request, item):
                end += item.num_tokens
                scored = logits_MV[start:end]
                # It may have ended since it was asked, with a step whose tokens were read only now.
                if self._runs(request) and not score_prompt(self._tokenizer, request, item.start, scored):
                    self._refuse(request, NOT_FINITE)
            else:
                end += item.samples
            if item.samples and self._runs(request):
                rows.append(end - 1)
                requests.append(request)
        if len(rows) < len(logits_MV):
            logits_MV = logits_MV[upload(np.array(rows, np.int64), logits_MV.device)]
        return requests, logits_MV

    def _advance(self, row: Drawn) -> None:
        """One generated token: show it, or end the request."""
        request, grammar = row.request, row.request.prepared.grammar
        if not self._runs(request):
            return
        if not row.finite:
            self._refuse(request, NOT_FINITE)
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
        try:
            self._tell_rest()
        except Exception:
            log.exception("what was not read yet is lost with the device")
        for request in list(self._requests.values()):
            request.emit(Failed(status, message, "server_error", "unavailable"))
            self.abort(request.seq.request_id)


def _failure(message: str) -> Failed:
    return Failed(status=500, message=message, error_type="server_error", code="internal_error")
