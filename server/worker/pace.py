"""How much may stand beside decodes in one step, from what steps have taken. Plain Python, no tensors."""

from __future__ import annotations

import statistics
from collections import deque

# Steps that an estimate is the median of: one slow step changes nothing. A prompt's tokens grow dearer the
# more of it there is to attend to, so that only its last ones tell.
_DECODES, _PROMPTS = 31, 7


class Pace:
    """Lets a step that decodes take `stretch` times as long as one that only decodes.

    A fixed number of prompt tokens is too many for one request on a processor, and too few for many on a
    GPU. So the loop says what each step took, and asks how many tokens, or how much of an image, fit beside
    the decodes. Steps that only decode are told apart by powers of two of their number.
    """

    def __init__(self, stretch: float = 2.25, least: int = 16, first: int = 64) -> None:
        """At `least` so many tokens move on in any step; the `first` ones, nothing being known."""
        self._stretch, self._least, self._first = stretch, least, first
        self._decodes: dict[int, deque[float]] = {}  # seconds, by the bits of the number of sequences
        self._tokens: deque[float] = deque(maxlen=_PROMPTS)  # seconds of a prompt's token

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step took so long, start to end."""
        if num_prompt_tokens >= self._least:
            beside = (self._decode_seconds(num_decodes) or 0.0) if num_decodes else 0.0
            self._tokens.append(max(seconds - beside, 0.0) / num_prompt_tokens)
        elif num_decodes and not num_prompt_tokens:
            bits = num_decodes.bit_length()
            self._decodes.setdefault(bits, deque(maxlen=_DECODES)).append(seconds)

    def spare_seconds(self, num_decodes: int) -> float:
        """What may be added to a step of so many decodes; endless beside none, or nothing being known."""
        decode = self._decode_seconds(num_decodes) if num_decodes else None
        return float("inf") if decode is None else (self._stretch - 1) * decode

    def prompt_tokens(self, num_decodes: int, spent: float = 0.0) -> int:
        """How many may stand beside so many decodes, `spent` seconds being gone for something else."""
        per_token = statistics.median(self._tokens) if self._tokens else 0.0
        spare = self.spare_seconds(num_decodes)
        if not per_token or spare == float("inf"):
            return self._first
        return max(self._least, int((spare - spent) / per_token))

    def _decode_seconds(self, num_decodes: int) -> float | None:
        """By steps of about as many, else of the nearest number known."""
        bits = num_decodes.bit_length()
        known = min(self._decodes, key=lambda other: abs(other - bits), default=None)
        return None if known is None else statistics.median(self._decodes[known])
