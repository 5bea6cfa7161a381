"""From a request's tokens to the text its client sees: decoding, stop strings, held-back beginnings."""

from __future__ import annotations

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
    start: int  # where its text begins in the held text
    token_id: int
    logprob: TokenLogprob | None


class OutputStream:
    """Turns tokens into `Delta`s. What may be the beginning of a stop string is held back."""

    def __init__(self, decoder: TextDecoder, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self._pending: list[_Pending] = []
        self.stopped = False

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> Delta | None:
        """The next token. None where there is nothing to show yet; sets `stopped` on a stop string."""
        self._pending.append(_Pending(len(self._held), token_id, logprob))
        self._held += self._decoder.push([token_id])
        cut = self._find_stop()
        if cut is not None:
            return self._stop_at(cut)
        ready = len(self._held) - self._possible_stop()
        return self._emit(ready) if ready else None

    def finish(self) -> Delta | None:
        """What is still held when generation ends without a stop string."""
        self._held += self._decoder.flush()
        cut = self._find_stop()
        if cut is not None:
            return self._stop_at(cut)
        return self._emit(len(self._held)) if self._held or self._pending else None

    def _find_stop(self) -> int | None:
        found = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        return min(found) if found else None

    def _stop_at(self, cut: int) -> Delta | None:
        self.stopped = True
        self._held = self._held[:cut]
        self._pending = [item for item in self._pending if item.start < cut]
        return self._emit(cut) if cut else None

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0

    def _emit(self, size: int) -> Delta:
        """Show the first `size` characters, and the tokens that begin in them."""
        text, self._held = self._held[:size], self._held[size:]
        shown = [item for item in self._pending if item.start < size or not self._held]
        rest = self._pending[len(shown) :]
        self._pending = [_Pending(item.start - size, item.token_id, item.logprob) for item in rest]
        return Delta(
            text=text,
            token_ids=tuple(item.token_id for item in shown),
            logprobs=tuple(item.logprob for item in shown if item.logprob is not None),
        )
