"""A request as the step loop wants it, and on its way through the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from server.worker.grammar import GrammarState
from server.worker.messages import Event, SamplingParams
from server.worker.output import OutputStream
from server.worker.sampler import SamplerState
from server.worker.sequence import Sequence
from server.worker.sight import ImageInput, LoadedAdapter


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokens instead of text, pixels instead of files."""

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
    seq: Sequence
    sampler: SamplerState
    output: OutputStream
    num_scored: int = 0  # tokens of the prompt whose log-probabilities are told
    queued: bool = True

    @property
    def runs_ahead(self) -> bool:
        """Its next step may be computed before the host knows its last token."""
        return self.sampler.runs_ahead and self.prepared.sampling.logprobs is None
