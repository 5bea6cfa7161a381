"""Log-probabilities as a request is told of them: of its tokens, and of the likeliest beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.tokenizer import Tokenizer
from server.worker.messages import SamplingParams, TokenLogprob, TopLogprob
from server.worker.sampler import log_probabilities


def raw_logprobs(logits_MV: Tensor, params: Sequence[SamplingParams]) -> dict[int, Tensor]:
    """log softmax [V] of the rows that report it; to be asked for before sampling changes the logits."""
    wanted = [m for m, own in enumerate(params) if own.logprobs is not None]
    return dict(zip(wanted, logits_MV[wanted].log_softmax(-1), strict=True)) if wanted else {}


def describe(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs_MV: Tensor, num_top: int
) -> list[TokenLogprob]:
    """Of each row of log softmax its own token, and the `num_top` best ones."""
    text = tokenizer.token_text
    chosen_M = torch.tensor(tokens, device=logprobs_MV.device)
    rows = (x.tolist() for x in log_probabilities(logprobs_MV, chosen_M, num_top))
    return [
        TokenLogprob(
            token,
            text(token),
            logprob,
            tuple(TopLogprob(i, text(i), value) for i, value in zip(ids, values, strict=True)),
        )
        for token, logprob, values, ids in zip(tokens, *rows, strict=True)
    ]
