"""Tokens are drawn from the distribution that a request asks for, and by its own number alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from server.worker.messages import SamplingParams
from server.worker.sampler import CANDIDATES, SamplerState, sample

VOCAB = CANDIDATES + 200  # flat rows need more than the candidates
CUTS: list[dict[str, Any]] = [
    {},
    {"min_p": 0.3},
    {"top_p": 0.5},
    {"top_k": 5},
    {"top_k": CANDIDATES + 100},
    {"top_p": 0.97},
    {"top_p": 0.9, "top_k": 40, "min_p": 0.02},
    {"temperature": 3.0, "top_p": 0.99},
]
NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def state(seed: int, **params: Any) -> SamplerState:
    return SamplerState(SamplingParams(seed=seed, **params), VOCAB, (1,), [0])


def test_a_seed_draws_the_token_that_it_draws_alone() -> None:
    logits_MV = torch.randn(len(CUTS), VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    for seed in range(20):
        alone = [sample(logits_MV[m : m + 1].clone(), [state(seed, **cut)])[0] for m, cut in enumerate(CUTS)]
        together, _ = sample(logits_MV.clone(), [state(seed, **cut) for cut in CUTS])
        assert together == [token for (token,) in alone]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_tokens_are_as_frequent_as_they_should_be(cut: dict[str, Any], spread: float) -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * spread
    draws, params = 4000, SamplingParams(**cut)
    tokens, _ = sample(logits_V.repeat(draws, 1), [state(seed, **cut) for seed in range(draws)])
    wanted = plainly(logits_V, params)
    got = Counter(tokens)
    assert got.keys() <= wanted.keys()
    for token, share in sorted(wanted.items(), key=lambda item: -item[1])[:5]:
        deviation = math.sqrt(share * (1 - share) / draws)
        assert got[token] / draws == pytest.approx(share, abs=5 * deviation + 1e-9)


def test_a_negative_seed_is_one_of_its_own() -> None:
    """Choices of one request have seeds in a row: -1, 0 and 1 must be three."""
    seeds = [-(2**63), -2, -1, 0, 1, 2, 2**63 - 1]
    logits_V = torch.zeros(VOCAB)
    draws = [
        tuple(sample(logits_V[None].clone(), [own])[0][0] for _ in range(4)) for own in map(state, seeds)
    ]
    assert len(set(draws)) == len(seeds)


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 5e-324])
def test_the_lowest_temperatures_take_the_best(temperature: float) -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    states = [state(m, temperature=temperature, **cut) for m, cut in enumerate(({}, {"top_p": 0.5}))]
    tokens, _ = sample(logits_V.repeat(2, 1), states)
    assert tokens == [int(logits_V.argmax())] * 2


@pytest.mark.parametrize("top_p", [1e-30, 1e-46, 5e-324])
def test_the_lowest_top_p_takes_the_best(top_p: float) -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    tokens, _ = sample(logits_V.repeat(5, 1), [state(seed, top_p=top_p) for seed in range(5)])
    assert tokens == [int(logits_V.argmax())] * 5


def test_top_p_is_of_the_k_best_however_many_they_are() -> None:
    cut = {"top_k": CANDIDATES + 100, "top_p": 0.5}
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 0.3
    wanted = plainly(logits_V, SamplingParams(**cut))
    tokens, _ = sample(logits_V.repeat(8000, 1), [state(seed, **cut) for seed in range(8000)])
    assert set(tokens) == wanted.keys()


def test_the_lowest_repetition_penalty_repeats() -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    logits_V[0] = 1.0  # of the prompt
    for changes in ({}, {"top_p": 0.5}, {"temperature": 0}):
        assert sample(logits_V[None].clone(), [state(0, repetition_penalty=1e-46, **changes)]) == (
            [0],
            [True],
        )


def plainly(logits_V: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """The probabilities after temperature, top-k, top-p and min-p, token by token."""
    probs = (logits_V.double() / params.temperature).softmax(-1).tolist()
    kept = sorted(range(VOCAB), key=lambda token: -probs[token])[: params.top_k or VOCAB]
    total, mass = sum(probs[token] for token in kept), 0.0
    nucleus = {}
    for token in kept:
        if mass < params.top_p and probs[token] >= params.min_p * probs[kept[0]]:
            nucleus[token] = probs[token]
        mass += probs[token] / total
    return {token: prob / sum(nucleus.values()) for token, prob in nucleus.items()}


V = 300


def greedy(**changes: object) -> SamplerState:
    return SamplerState(SamplingParams(temperature=0, **changes), VOCAB, (2,), [3, 4])


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))


def test_rows_that_take_the_likeliest_beside_one_that_does_not():
    """Who shares a step decides which way it goes."""
    states = [greedy() for _ in range(3)]
    assert all(own.takes_best for own in states)
    drawn = SamplerState(SamplingParams(temperature=1, seed=1), VOCAB, (2,), [3])
    assert not drawn.takes_best
    quick = sample(logits(4)[:3], states)
    mixed = sample(logits(4), [*(greedy() for _ in range(3)), drawn])
    assert quick == (mixed[0][:3], mixed[1][:3])
    assert quick[0] == logits(4)[:3].argmax(1).tolist()


@pytest.mark.parametrize("number", NOT_FINITE.values(), ids=NOT_FINITE)
def test_logits_that_are_not_finite_are_told(number: float):
    rows = logits(3)
    rows[1, 7] = number
    rows[2] = number
    expected = sample(rows.clone(), [greedy(logit_bias={5: 0.0}) for _ in range(3)])
    found = sample(rows.clone(), [greedy() for _ in range(3)])
    assert found[1] == expected[1]
    assert found[1][0]
    assert not found[1][2]
    assert found[0][0] == expected[0][0]


@pytest.mark.parametrize(
    "changes", [{"logit_bias": {9: 100.0}}, {"repetition_penalty": 1.5}, {"min_tokens": 1}], ids=str
)
def test_what_changes_logits_is_heeded(changes: dict[str, object]):
    rows = torch.zeros(1, VOCAB)
    rows[0, 2], rows[0, 9], rows[0, 3] = 3.0, 2.0, 3.1  # the end, another one, one of the prompt
    own = greedy(**changes)
    assert not own.takes_best
    rows[0, 3] = 1.0 if "min_tokens" in changes else rows[0, 3]
    expected = {"logit_bias": 9, "repetition_penalty": 2, "min_tokens": 9}[next(iter(changes))]
    assert sample(rows, [own])[0] == [expected]
    assert own.takes_best is ("min_tokens" in changes)


def test_penalties_are_those_of_their_formulas():
    """Repetition divides what is above zero and multiplies what is below, of prompt and answer alike. The
    others are taken off the answer's own tokens: frequency for each time, presence once."""
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    own = SamplerState(params, 6, (5,), [0, 1])
    for token in (1, 2, 2):
        own.take(token)
    row_V = torch.tensor([4.0, -4.0, 4.0, -4.0, 4.0, 0.0])
    own.adjust(row_V)
    assert row_V.tolist() == [2.0, -8.0 - 0.75, 2.0 - 1.25, -4.0, 4.0, 0.0]


def test_an_answer_may_end_once_it_has_its_least_tokens():
    own = greedy(min_tokens=2, logit_bias={9: 0.0})  # with a bias none is simply the best
    rows = torch.zeros(1, VOCAB)
    rows[0, 2], rows[0, 9] = 3.0, 2.0
    assert [sample(rows.clone(), [own])[0][0] for _ in range(3)] == [9, 9, 2]
