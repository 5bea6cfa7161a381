"""A base's fingerprint: the same for its copies, another for any other base."""

from __future__ import annotations

import re

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from models.fingerprint import fingerprint, likeness

STORED = "469dfd4405ef2e61-bbfcbf2eddcdbe5d5a44e5c563ac6d36a86d445a92ca0375296e74a87e087365"


def embedding(V: int = 1000, C: int = 16) -> torch.Tensor:
    return torch.randn(V, C, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("V", [1, 7, 256, 257, 1000])
def test_float32_and_bfloat16_copies_agree(V: int):
    full = embedding(V)
    assert re.fullmatch(r"[0-9a-f]{16}-([0-9a-f]{2}){1,32}", fingerprint(full))
    assert fingerprint(full) == fingerprint(full.to(torch.bfloat16))
    assert fingerprint(full) == fingerprint(full.to(torch.bfloat16).to(torch.float32))
    assert fingerprint(full) == fingerprint(full.T.contiguous().T)  # memory layout is no part of it


def test_it_is_stable_over_releases():
    """Adapters store it: a change here would refuse every adapter that was saved before."""
    values = torch.arange(600, dtype=torch.float32).view(300, 2) / 7
    assert fingerprint(values) == STORED


def test_other_bases_differ():
    full = embedding()
    assert fingerprint(full + 0.1) != fingerprint(full)
    assert fingerprint(full[:999]) != fingerprint(full)
    assert fingerprint(full.flip(0)) != fingerprint(full)
    assert fingerprint(torch.zeros(2, 3)) != fingerprint(torch.zeros(3, 2))
    one = full.clone()
    one[0, 0] += 1  # the first row is always sampled
    assert fingerprint(one) != fingerprint(full)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("V", [40, 1000])
def test_rounded_and_quantised_copies_are_near(kind: str, V: int):
    full, type_ = embedding(V, 64), GGMLQuantizationType[kind]
    copy = torch.from_numpy(dequantize(quantize(full.numpy(), type_), type_)).view(full.shape)
    assert likeness(fingerprint(full), fingerprint(copy)) == ("same" if kind == "BF16" else "near")
    assert likeness(fingerprint(copy), fingerprint(full)) != "other"


def test_coarser_copies_are_not_near():
    """Two bits a value keep three quarters of a row: no file that anybody serves."""
    full = embedding(1000, 64)
    assert likeness(fingerprint(full), fingerprint(full.sign())) == "other"


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_other_bases_are_not_near(offset: float):
    """Also where all rows share a large part, as trained embeddings do."""
    prints = [
        fingerprint(torch.randn(1000, 64, generator=torch.Generator().manual_seed(seed)) + offset)
        for seed in range(20)
    ]
    pairs = [(a, b) for i, a in enumerate(prints) for b in prints[:i]]
    assert {likeness(a, b) for a, b in pairs} == {"other"}
    full = embedding() + offset
    assert likeness(fingerprint(full), fingerprint(full.flip(0))) == "other"
    assert likeness(fingerprint(full), fingerprint(full.flip(1))) == "other"


def test_fingerprints_without_a_sketch_are_the_same_or_not():
    full = fingerprint(embedding())
    other = fingerprint(embedding() * 1.01)
    assert likeness(full, other) == "near"
    assert likeness(full[:16], full) == likeness(full, full[:16]) == "same"
    assert likeness(full[:16], other) == likeness(other[:16], full) == "other"


@pytest.mark.parametrize(
    "odd", ["", "abc", "-", "0" * 16 + "-", "0" * 16 + "-xyz", "0" * 16 + "-" + "00" * 99]
)
def test_any_text_in_a_manifest_is_compared(odd: str):
    assert likeness(odd, fingerprint(embedding())) == "other"
    assert likeness(odd, odd) == "same"
