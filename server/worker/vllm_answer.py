"""From the tokens that vLLM gives to a request's events, the same as the native step loop's. No vLLM here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from models.tokenizer import IncrementalDecoder, Tokenizer
from server.errors import InvalidRequest
from server.worker.messages import (
    SCORES,
    Event,
    Failed,
    Finished,
    FinishReason,
    TokenLogprob,
    TopLogprob,
    Usage,
    score_pieces,
)
from server.worker.output import OutputStream
from server.worker.request import Prepared
from server.worker.tool_calls import ToolCallEvents


class Scored(Protocol):
    """vLLM's `Logprob`."""

    @property
    def logprob(self) -> float: ...

    @property
    def rank(self) -> int | None: ...


Step = Mapping[int, Scored]  # the token that came, or was asked about, and the best ones


class Answer:
    """One request's answer while it grows. What `push` and the others give back goes to the client."""

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer) -> None:
        self.ended = False
        self._prepared = prepared
        self._tokenizer = tokenizer
        decoder = IncrementalDecoder(tokenizer, continuation=prepared.continues_text)
        self._output = OutputStream(decoder, prepared.stop, prepared.sampling.min_tokens)
        self._generated = 0
        self._events: list[Event] = []
        grammar = prepared.sampling.grammar
        add = self._events.append
        self._emit = ToolCallEvents(add, grammar) if grammar is not None and grammar.tools else add

    def score_prompt(self, steps: Sequence[Step | None]) -> Iterator[Event]:
        """`steps` tell of each of the prompt's tokens, placeholders left out.

        Piece by piece: to describe a long prompt at once would hold up everybody's events.
        """
        ids, wanted = self._prepared.token_ids, self._prepared.sampling.prompt_logprobs or 0
        text, raw = self._tokenizer.token_text, self._tokenizer.partial_bytes
        assert len(steps) == len(ids)
        for start in range(0, len(ids), SCORES):
            end = start + SCORES
            scored = [
                self._describe(ids[i], step, wanted)
                if i and step  # nothing precedes the first
                else TokenLogprob(ids[i], text(ids[i]), None, raw=raw(ids[i]))
                for i, step in enumerate(steps[start:end], start)
            ]
            for piece in score_pieces(scored, self._tokenizer.decode(ids) if end >= len(ids) else None):
                self._emit(piece)
            yield from self._taken()

    def push(self, tokens: Sequence[int], steps: Sequence[Step] | None, cached_tokens: int) -> list[Event]:
        """The next tokens; `steps` where log-probabilities were asked for."""
        for i, token in enumerate(tokens):
            if self.ended or self._generated == self._prepared.max_tokens:
                break
            self._generated += 1
            wanted = self._prepared.sampling.logprobs
            scored = None if steps is None or wanted is None else self._describe(token, steps[i], wanted)
            self._take(token, scored, cached_tokens)
        return self._taken()

    def finish(self, reason: FinishReason, cached_tokens: int) -> list[Event]:
        """vLLM has no more to say."""
        if not self.ended:
            cut = self._generated == self._prepared.max_tokens  # vLLM generates one where none was asked for
            self._finish("length" if cut else reason, cached_tokens)
        return self._taken()

    def _take(self, token: int, scored: TokenLogprob | None, cached_tokens: int) -> None:
        params, grammar = self._prepared.sampling, self._prepared.grammar
        if grammar is not None:
            grammar.take(token)
            if grammar.error:
                self._break_off(grammar.error, grammar.param)
                return
        if token in self._tokenizer.eos_ids and not params.ignore_eos:
            if params.prompt_logprobs is not None:
                self._output.push(token, scored)  # who scores a prompt counts on every token
            self._finish("stop", cached_tokens)
            return
        delta = self._output.push(token, scored)
        if delta is not None:
            self._emit(delta)
        if self._output.stopped or (grammar is not None and grammar.is_complete):
            self._finish("stop", cached_tokens)

    def _finish(self, reason: FinishReason, cached_tokens: int) -> None:
        if not self._output.stopped:
            delta = self._output.finish()
            if delta is not None:
                self._emit(delta)
            reason = "stop" if self._output.stopped else reason
        self._emit(Finished(reason, Usage(len(self._prepared.token_ids), self._generated, cached_tokens)))
        self.ended = True

    def _break_off(self, reason: str, param: str) -> None:
        message = f"The grammar could not be followed to the end; simplify it: {reason}"
        error = InvalidRequest(message, param=param, code="grammar_too_complex")
        self._emit(Failed(error.status, error.message, error.type, error.code, error.param))
        self.ended = True

    def _describe(self, token: int, step: Step, num_top: int) -> TokenLogprob:
        text, raw = self._tokenizer.token_text, self._tokenizer.partial_bytes
        ranked = sorted((scored.rank or 0, id) for id, scored in step.items())
        top = tuple(
            TopLogprob(id, text(id), step[id].logprob, raw(id)) for rank, id in ranked if rank <= num_top
        )
        return TokenLogprob(token, text(token), step[token].logprob, top, raw(token))

    def _taken(self) -> list[Event]:
        events = self._events.copy()
        self._events.clear()
        return events
