"""A base's fingerprint: the same for its copies, another for any other base."""

from __future__ import annotations

import re

import pytest
import torch

from models.fingerprint import fingerprint


def embedding(V: int = 1000, C: int = 16) -> torch.Tensor:
    return torch.randn(V, C, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("V", [1, 7, 256, 257, 1000])
def test_float32_and_bfloat16_copies_agree(V: int):
    full = embedding(V)
    assert re.fullmatch(r"[0-9a-f]{16}", fingerprint(full))
    assert fingerprint(full) == fingerprint(full.to(torch.bfloat16))
    assert fingerprint(full) == fingerprint(full.to(torch.bfloat16).to(torch.float32))
    assert fingerprint(full) == fingerprint(full.T.contiguous().T)  # memory layout is no part of it


def test_it_is_stable_over_releases():
    """Adapters store it: a change here would refuse every adapter that was saved before."""
    values = torch.arange(600, dtype=torch.float32).view(300, 2) / 7
    assert fingerprint(values) == "469dfd4405ef2e61"


def test_other_bases_differ():
    full = embedding()
    assert fingerprint(full + 0.1) != fingerprint(full)
    assert fingerprint(full[:999]) != fingerprint(full)
    assert fingerprint(full.flip(0)) != fingerprint(full)
    assert fingerprint(torch.zeros(2, 3)) != fingerprint(torch.zeros(3, 2))
    one = full.clone()
    one[0, 0] += 1  # the first row is always sampled
    assert fingerprint(one) != fingerprint(full)
