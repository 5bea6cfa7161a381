"""Log-probabilities as a request is told of them: of its tokens, and of the likeliest beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.tokenizer import Tokenizer
from models.uploads import upload
from server.worker.messages import SamplingParams, TokenLogprob, TopLogprob, score_pieces
from server.worker.request import ActiveRequest
from server.worker.sampler import log_probabilities

_ROWS = 64  # of a prompt, at once: a whole chunk's log softmax would take as much memory again as its logits


def raw_logprobs(logits_MV: Tensor, params: Sequence[SamplingParams]) -> dict[int, tuple[list[int], Tensor]]:
    """By how many of the best tokens are reported: the rows that do so, and their log softmax [W, V].

    To be asked for before sampling changes the logits.
    """
    wanted: dict[int, list[int]] = {}
    for m, own in enumerate(params):
        if own.logprobs is not None:
            wanted.setdefault(own.logprobs, []).append(m)
    return {
        num_top: (rows, logits_MV[upload(rows, logits_MV.device)].log_softmax(-1))
        for num_top, rows in wanted.items()
    }


def describe(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs_MV: Tensor, num_top: int
) -> list[TokenLogprob]:
    """Of each row of log softmax its own token, and the `num_top` best ones."""
    text, raw = tokenizer.token_text, tokenizer.partial_bytes
    chosen_M, top_MW, ids_MW = log_probabilities(logprobs_MV, upload(tokens, logprobs_MV.device), num_top)
    # One wait for the device; float64 has all of these numbers exactly.
    told = torch.cat([part.double() for part in (chosen_M[:, None], top_MW, ids_MW)], 1).tolist()
    described = []
    for token, (logprob, *top) in zip(tokens, told, strict=True):
        best = zip(map(int, top[num_top:]), top[:num_top], strict=True)
        tops = tuple(TopLogprob(id, text(id), value, raw(id)) for id, value in best)
        described.append(TokenLogprob(token, text(token), logprob, tops, raw(token)))
    return described


def score_prompt(tokenizer: Tokenizer, request: ActiveRequest, start: int, logits_TV: Tensor) -> bool:
    """Tell a chunk's log-probabilities of the prompt itself: row t foretells position start + t + 1. False
    where logits are not finite."""
    seq, num_top = request.seq, request.prepared.sampling.prompt_logprobs
    assert num_top is not None
    scored = []
    if not request.num_scored:
        first = seq.token_ids[0]
        raw = tokenizer.partial_bytes(first)
        scored.append(TokenLogprob(first, tokenizer.token_text(first), None, raw=raw))
    # After a preemption, what was told already is computed once more and left alone here.
    begin = max(start + 1, request.num_scored + len(scored))
    end = min(start + len(logits_TV) + 1, seq.num_prompt_tokens)
    if begin < end:
        rows = logits_TV[begin - start - 1 : end - start - 1]
        if not rows.amax(-1).isfinite().all():
            return False
        tokens = seq.token_ids[begin:end]
        for i in range(0, len(rows), _ROWS):
            logprobs_MV = rows[i : i + _ROWS].log_softmax(-1)
            scored += describe(tokenizer, tokens[i : i + _ROWS], logprobs_MV, num_top)
    request.num_scored += len(scored)
    ended = request.num_scored == seq.num_prompt_tokens
    text = tokenizer.decode(seq.token_ids[: seq.num_prompt_tokens]) if ended else None
    for piece in score_pieces(scored, text):
        request.emit(piece)
    return True
