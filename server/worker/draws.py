"""A step's tokens: drawn and read at once, or drawn and left on the device while the next step begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.tokenizer import Tokenizer
from server.worker.messages import TokenLogprob
from server.worker.request import ActiveRequest
from server.worker.sampler import Choice, sample, sample_ahead
from server.worker.scheduler import Batch
from server.worker.scores import describe, raw_logprobs


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sampled token; `finite` is False where the logits were not."""

    request: ActiveRequest
    token: int
    finite: bool
    logprob: TokenLogprob | None = None


def draw(tokenizer: Tokenizer, requests: Sequence[ActiveRequest], logits_MV: Tensor) -> list[Drawn]:
    """A token for each request, by its row of logits, which are changed."""
    if not requests:
        return []
    params = [request.prepared.sampling for request in requests]
    logprobs = raw_logprobs(logits_MV, params)
    tokens, finite = sample(logits_MV, [request.sampler for request in requests])
    told: dict[int, TokenLogprob] = {}
    for num_top, (rows, logprobs_WV) in logprobs.items():
        scored = describe(tokenizer, [tokens[m] for m in rows], logprobs_WV, num_top)
        told |= zip(rows, scored, strict=True)
    return [Drawn(request, tokens[m], finite[m], told.get(m)) for m, request in enumerate(requests)]


@dataclass(frozen=True, slots=True)
class Ahead:
    """Tokens of a step that nobody has read; the device may compute it still."""

    rows: dict[ActiveRequest, int]  # of `choice`
    choice: Choice
    batch: Batch
    began: float

    @classmethod
    def draw(cls, requests: Sequence[ActiveRequest], logits_MV: Tensor, batch: Batch, began: float) -> Ahead:
        """As `draw`, for requests that all run ahead."""
        choice = sample_ahead(logits_MV, [request.sampler for request in requests])
        return cls({request: m for m, request in enumerate(requests)}, choice, batch, began)

    def read(self) -> list[Drawn]:
        """Wait for the step, and put its tokens where they are still missing."""
        tokens, finite = self.choice.read()
        for request, token in zip(self.rows, tokens, strict=True):
            if request.seq.waits_to_be_read:
                request.seq.token_ids[-1] = token
        return [Drawn(*row) for row in zip(self.rows, tokens, finite, strict=True)]
