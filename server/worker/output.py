"""From a request's tokens to the text its client sees: decoding, stop strings, held-back beginnings."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.worker.messages import Delta, TokenLogprob


class TextDecoder(Protocol):
    """Tokens in, text out, never a partial UTF-8 character (`models.tokenizer.IncrementalDecoder`)."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class _Pending:
    start: int  # where its text begins in the whole answer
    token_id: int
    logprob: TokenLogprob | None


class _Stop:
    """How much of one stop string the text ends with: Knuth, Morris and Pratt, a character at a time.

    Its table grows with what was matched: a long string that is never met costs nothing.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = [0]  # of each beginning: how much of its end is a beginning too

    def find(self, text: str) -> int | None:
        """Go on with `text`; where in it the stop string is complete."""
        for end, char in enumerate(text, 1):
            while self.matched and self.text[self.matched] != char:
                self.matched = self._borders[self.matched - 1]
            if self.text[self.matched] == char:
                self.matched += 1
            if self.matched == len(self.text):
                return end
            if self.matched > len(self._borders):
                self._grow()
        return None

    def _grow(self) -> None:
        char, border = self.text[len(self._borders)], self._borders[-1]
        while border and self.text[border] != char:
            border = self._borders[border - 1]
        self._borders.append(border + (self.text[border] == char))


class OutputStream:
    """Turns tokens into `Delta`s. What may be the beginning of a stop string is held back.

    All that it costs grows with the answer's length alone, however much is held back.
    """

    def __init__(self, decoder: TextDecoder, stop: Sequence[str], min_tokens: int = 0) -> None:
        """The text of the first `min_tokens` tokens is shown whatever it is."""
        self._decoder = decoder
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._stops = [_Stop(text) for text in stop if text]
        self._held = ""
        self._num_shown = 0  # characters
        self._pending: deque[_Pending] = deque()
        self.stopped = False

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> Delta | None:
        """The next token. None where there is nothing to show yet; sets `stopped` on a stop string."""
        self._num_tokens += 1
        self._pending.append(_Pending(self._num_shown + len(self._held), token_id, logprob))
        cut = self._read(self._decoder.push([token_id]))
        if cut is not None:
            return self._stop_at(cut)
        ready = len(self._held) - max((stop.matched for stop in self._stops), default=0)
        return self._emit(ready) if ready else None

    def finish(self) -> Delta | None:
        """What is still held when generation ends without a stop string."""
        cut = self._read(self._decoder.flush())
        if cut is not None:
            return self._stop_at(cut)
        return self._emit(len(self._held)) if self._held or self._pending else None

    def _read(self, text: str) -> int | None:
        """Hold more text; where in what is held a stop string begins, the first one."""
        before = len(self._held)
        self._held += text
        if self._num_tokens <= self._min_tokens:
            return None
        ends = [(stop.find(text), stop) for stop in self._stops]
        return min((before + end - len(stop.text) for end, stop in ends if end is not None), default=None)

    def _stop_at(self, cut: int) -> Delta | None:
        self.stopped = True
        self._held = self._held[:cut]
        while self._pending and self._pending[-1].start >= self._num_shown + cut:
            self._pending.pop()
        return self._emit(cut) if cut else None

    def _emit(self, size: int) -> Delta:
        """Show the first `size` characters, and the tokens that begin in them."""
        text, self._held = self._held[:size], self._held[size:]
        self._num_shown += size
        shown = []
        while self._pending and (self._pending[0].start < self._num_shown or not self._held):
            shown.append(self._pending.popleft())
        return Delta(
            text=text,
            token_ids=tuple(item.token_id for item in shown),
            logprobs=tuple(item.logprob for item in shown if item.logprob is not None),
        )
