"""Likeliest tokens come by a quicker way; it is the same as the one that everything else takes."""

from __future__ import annotations

import pytest
import torch

from server.worker.messages import SamplingParams
from server.worker.sampler import SamplerState, sample

V = 300
NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def state(**changes: object) -> SamplerState:
    return SamplerState(SamplingParams(temperature=0, **changes), V, (2,), [3, 4])


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(0))


def test_rows_that_take_the_likeliest_beside_one_that_does_not():
    """Who shares a step decides which way it goes."""
    greedy = [state() for _ in range(3)]
    assert all(own.takes_best for own in greedy)
    drawn = SamplerState(SamplingParams(temperature=1, seed=1), V, (2,), [3])
    assert not drawn.takes_best
    quick = sample(logits(4)[:3], greedy)
    mixed = sample(logits(4), [*(state() for _ in range(3)), drawn])
    assert quick == (mixed[0][:3], mixed[1][:3])
    assert quick[0] == logits(4)[:3].argmax(1).tolist()


@pytest.mark.parametrize("number", NOT_FINITE.values(), ids=NOT_FINITE)
def test_logits_that_are_not_finite_are_told(number: float):
    rows = logits(3)
    rows[1, 7] = number
    rows[2] = number
    expected = sample(rows.clone(), [state(logit_bias={5: 0.0}) for _ in range(3)])
    found = sample(rows.clone(), [state() for _ in range(3)])
    assert found[1] == expected[1]
    assert found[1][0]
    assert not found[1][2]
    assert found[0][0] == expected[0][0]


@pytest.mark.parametrize(
    "changes", [{"logit_bias": {9: 100.0}}, {"repetition_penalty": 1.5}, {"min_tokens": 1}], ids=str
)
def test_what_changes_logits_is_heeded(changes: dict[str, object]):
    rows = torch.zeros(1, V)
    rows[0, 2], rows[0, 9], rows[0, 3] = 3.0, 2.0, 3.1  # the end, another one, one of the prompt
    own = state(**changes)
    assert not own.takes_best
    rows[0, 3] = 1.0 if "min_tokens" in changes else rows[0, 3]
    expected = {"logit_bias": 9, "repetition_penalty": 2, "min_tokens": 9}[next(iter(changes))]
    assert sample(rows, [own])[0] == [expected]
    assert own.takes_best is ("min_tokens" in changes)
