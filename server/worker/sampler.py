"""From logits to tokens: one pass for the whole batch, each row by its own parameters.

A row's token depends on that row alone: its random number comes from its own generator, so that a
seeded request repeats itself whatever else is in the batch. Shapes: M rows, V vocabulary, W candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch import Tensor

from models.uploads import upload
from server.worker.grammar import GrammarState, constrain
from server.worker.messages import SamplingParams

# Rows that cut off their tail (top-k, top-p) sort this many candidates first, and the whole
# vocabulary only where these do not hold enough probability.
CANDIDATES = 512
# What is less may be 0 in float32: 0 / 0 for a temperature, and for top-p no token at all.
_LEAST = torch.finfo(torch.float32).tiny
_MOST = torch.finfo(torch.float32).max


@dataclass(slots=True)
class SamplerState:
    """One request's parameters and what they need to remember."""

    params: SamplingParams
    vocab_size: int
    eos_ids: tuple[int, ...]
    prompt_ids: Sequence[int]
    grammar: GrammarState | None = None
    num_generated: int = 0
    random: Random = field(init=False)
    _counts_V: Tensor | None = field(init=False, default=None)  # of generated tokens
    _in_prompt_V: Tensor | None = field(init=False, default=None)
    _bias: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        p = self.params
        # Python's generator takes a negative number for its absolute value.
        seed = None if p.seed is None else p.seed % 2**64
        self.random = Random(seed)  # noqa: S311  (sampling is no cryptography)
        if p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1:
            self._counts_V = torch.zeros(self.vocab_size)
            self._in_prompt_V = torch.zeros(self.vocab_size, dtype=torch.bool)
            self._in_prompt_V[torch.tensor(list(self.prompt_ids))] = True
        if p.logit_bias:
            self._bias = (torch.tensor(list(p.logit_bias)), torch.tensor(list(p.logit_bias.values())))

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0

    @property
    def takes_best(self) -> bool:
        """The next token is the likeliest, as the model has it."""
        return (
            self.greedy
            and self.grammar is None
            and self._bias is None
            and self._counts_V is None
            and self.num_generated >= self.params.min_tokens
        )

    @property
    def runs_ahead(self) -> bool:
        """The host need not know a token for the next one to be chosen."""
        return self.grammar is None and self._counts_V is None

    def adjust(self, logits_V: Tensor) -> None:
        """Penalties, bias and what may not come yet, in place."""
        p = self.params
        if self._counts_V is not None and self._in_prompt_V is not None:
            counts_V = upload(self._counts_V, logits_V.device)
            seen_V = (counts_V > 0) | upload(self._in_prompt_V, logits_V.device)
            penalised_V = torch.where(
                logits_V > 0, logits_V / p.repetition_penalty, logits_V * p.repetition_penalty
            )
            torch.where(seen_V, penalised_V.clamp(max=_MOST), logits_V, out=logits_V)
            logits_V -= p.frequency_penalty * counts_V + p.presence_penalty * (counts_V > 0)
        if self._bias is not None:
            ids, values = (upload(x, logits_V.device) for x in self._bias)
            logits_V.index_add_(0, ids, values)
        if self.num_generated < p.min_tokens and self.eos_ids:
            logits_V[upload(self.eos_ids, logits_V.device)] = -torch.inf

    def take(self, token: int) -> None:
        """The request's next token is this one."""
        self.num_generated += 1
        if self.grammar is not None:
            self.grammar.take(token)
        if self._counts_V is not None:
            self._counts_V[token] += 1


class Choice:
    """One token per row, which the device knows before the host does."""

    def __init__(self, chosen_2M: Tensor) -> None:
        """`chosen_2M`: tokens, and whether the row's logits were finite; int64."""
        self.tokens_M = chosen_2M[0]
        on_gpu = chosen_2M.device.type == "cuda"
        self._host_2M = torch.empty(chosen_2M.shape, dtype=chosen_2M.dtype, pin_memory=on_gpu)
        self._host_2M.copy_(chosen_2M, non_blocking=True)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> tuple[list[int], list[bool]]:
        """What `sample` gives. Waits for the device to come so far, not for what it was given since.

        Raises RuntimeError where the device failed.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return _listed(self._host_2M)


@torch.inference_mode()
def sample_ahead(logits_MV: Tensor, states: Sequence[SamplerState]) -> Choice:
    """As `sample`, of states that all run ahead, and without a wait.

    Rows with top-p and no small top-k make one: whether their candidates are enough is asked of the device.
    """
    choice = Choice(_choose(logits_MV, states))
    for state in states:
        state.num_generated += 1
    return choice


@torch.inference_mode()
def sample(logits_MV: Tensor, states: Sequence[SamplerState]) -> tuple[list[int], list[bool]]:
    """One token per row, and whether the row's logits were finite. `logits_MV` is float32 and is changed."""
    if logits_MV.device.type == "cpu" and all(state.takes_best for state in states):
        tokens, finite = _best(logits_MV)
    else:
        tokens, finite = _listed(_choose(logits_MV, states))  # the one wait for the device
    for token, state in zip(tokens, states, strict=True):
        state.take(token)
    return tokens, finite


def _best(logits_MV: Tensor) -> tuple[list[int], list[bool]]:
    """By numpy, which takes a tenth of torch's time. One that is not finite is the best of its row."""
    rows_MV = logits_MV.numpy()
    tokens_M = rows_MV.argmax(1)
    return tokens_M.tolist(), np.isfinite(rows_MV[np.arange(len(tokens_M)), tokens_M]).tolist()


def _listed(chosen_2M: Tensor) -> tuple[list[int], list[bool]]:
    tokens, finite = chosen_2M.tolist()
    return tokens, list(map(bool, finite))


def _choose(logits_MV: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Tokens, and whether the row's logits were finite, [2, M] in int64."""
    finite_M = logits_MV.amax(-1).isfinite()
    for logits_V, state in zip(logits_MV, states, strict=True):
        state.adjust(logits_V)
    constrain(logits_MV, [state.grammar for state in states])
    tokens_M = logits_MV.argmax(-1)
    drawn = [m for m, state in enumerate(states) if not state.greedy]
    if drawn:
        rows = upload(drawn, logits_MV.device)
        tokens_M[rows] = _draw(logits_MV[rows], [states[m] for m in drawn])
    return torch.stack((tokens_M, finite_M.long()))


def _draw(logits_MV: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Tokens [M] drawn from softmax(logits / temperature), cut to top-k, top-p and min-p in this order."""

    def column(values: list[float]) -> Tensor:
        return upload(values, logits_MV.device)[:, None]

    temperature_M1 = column([max(state.params.temperature, _LEAST) for state in states])
    uniform_M1 = column([state.random.random() for state in states])
    min_p_M1 = column([state.params.min_p for state in states])
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled_MV = (logits_MV - logits_MV.amax(-1, keepdim=True)) / temperature_M1
    probs_MV = scaled_MV.softmax(-1)
    # The same uniform number means another token in another order: what sorts a row is its own parameters.
    cut = [m for m, state in enumerate(states) if state.params.top_p < 1 or state.params.top_k]
    if not cut:
        return _invert(_at_least(probs_MV, min_p_M1), uniform_M1)
    tokens_M = torch.empty(len(states), dtype=torch.long, device=logits_MV.device)
    if len(cut) < len(states):
        whole = upload(sorted({*range(len(states))} - {*cut}), logits_MV.device)
        tokens_M[whole] = _invert(_at_least(probs_MV[whole], min_p_M1[whole]), uniform_M1[whole])
    top_k_M1 = column([float(states[m].params.top_k or probs_MV.shape[-1]) for m in cut])
    top_p_M1 = column([max(states[m].params.top_p, _LEAST) for m in cut])
    rows = upload(cut, logits_MV.device)
    cut_MV, uniform_M1, min_p_M1 = probs_MV[rows], uniform_M1[rows], min_p_M1[rows]
    may_lack = any(not 0 < states[m].params.top_k <= CANDIDATES for m in cut)
    tokens_M[rows] = _draw_cut(cut_MV, uniform_M1, top_k_M1, top_p_M1, min_p_M1, may_lack)
    return tokens_M


def _draw_cut(
    probs_MV: Tensor,
    uniform_M1: Tensor,
    top_k_M1: Tensor,
    top_p_M1: Tensor,
    min_p_M1: Tensor,
    may_lack: bool,
) -> Tensor:
    """Tokens [M] of rows with top-k or top-p: among a row's candidates, or all tokens where those lack.

    `may_lack` is False where every row's top-k is within them.
    """
    V = probs_MV.shape[-1]

    def draw(probs_MW: Tensor, ids_MW: Tensor, rows: slice | Tensor) -> Tensor:
        """`probs_MW` descend, and belong to the tokens `ids_MW`."""
        ranks_W = torch.arange(probs_MW.shape[-1], device=probs_MW.device)
        probs_MW = probs_MW * (ranks_W < top_k_M1[rows])
        sums_M1 = probs_MW.sum(-1, keepdim=True)
        probs_MW = probs_MW / sums_M1.where(top_k_M1[rows] < V, torch.ones_like(sums_M1))
        before_MW = probs_MW.cumsum(-1) - probs_MW
        probs_MW = probs_MW * (before_MW < top_p_M1[rows])  # the token that crosses top_p still counts
        kept_MW = _at_least(probs_MW, min_p_M1[rows])
        return ids_MW.gather(-1, _invert(kept_MW, uniform_M1[rows])[:, None]).flatten()

    W = min(V, CANDIDATES)
    probs_MW, ids_MW = probs_MV.topk(W, sorted=True)
    tokens_M = draw(probs_MW, ids_MW, slice(None))
    if not may_lack:
        return tokens_M
    # Top-p is of the sum of the k best, which must all be there.
    enough_M1 = (top_k_M1 <= W) | ((top_k_M1 >= V) & (probs_MW.sum(-1, keepdim=True) >= top_p_M1))
    lacking = (~enough_M1.flatten()).nonzero().flatten()  # by number: each use of a mask would wait anew
    if len(lacking):
        tokens_M[lacking] = draw(*probs_MV[lacking].sort(-1, descending=True), lacking)
    return tokens_M


def _at_least(probs_MW: Tensor, min_p_M1: Tensor) -> Tensor:
    """Zero what is less than `min_p` times the row's best."""
    return probs_MW * (probs_MW >= min_p_M1 * probs_MW.amax(-1, keepdim=True))


def _invert(weights_MW: Tensor, uniform_M1: Tensor) -> Tensor:
    """The index [M] at which each row's cumulated weights pass `uniform` of their sum."""
    cumulated_MW = weights_MW.double().cumsum(-1)
    threshold_M1 = uniform_M1.double() * cumulated_MW[:, -1:]
    index_M1 = torch.searchsorted(cumulated_MW, threshold_M1, right=True)
    # Rounding must not lead past the last index that has weight.
    last_M1 = (weights_MW.shape[-1] - 1) - weights_MW.flip(-1).gt(0).int().argmax(-1, keepdim=True)
    return torch.minimum(index_M1, last_M1).flatten()


def log_probabilities(logprobs_MV: Tensor, chosen_M: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows of log softmax: the chosen tokens' [M], the best ones' [M, n], and the ids of these [M, n]."""
    chosen = logprobs_MV.gather(-1, chosen_M[:, None]).flatten()
    top, ids = logprobs_MV.topk(num_top, dim=-1)
    return chosen, top, ids
