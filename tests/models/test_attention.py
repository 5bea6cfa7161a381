"""The attention against its formula, written out position by position in float64, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.attention import DenseAttend, Prompts, causal_attention, prompt_attention

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}
HEADS = [(4, 4), (6, 2), (3, 1)]  # H query heads on G key/value heads


def naive(q_D: Tensor, k_UD: Tensor, v_UD: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v of one query, term by term; nothing of nothing."""
    if not len(k_UD):
        return torch.zeros_like(q_D)
    scores = [(q_D * k_D).sum() / math.sqrt(len(q_D)) for k_D in k_UD]
    top = torch.stack(scores).max().detach()
    weights = [(score - top).exp() for score in scores]
    return sum(w * v_D for w, v_D in zip(weights, v_UD, strict=True)) / sum(weights)


def naive_causal(q_THD: Tensor, k_UGD: Tensor, v_UGD: Tensor) -> Tensor:
    """The last T of U positions, each over itself and what came before."""
    T, H, _ = q_THD.shape
    U, G, _ = k_UGD.shape
    rows = []
    for t in range(T):
        seen = U - T + t + 1
        heads = [naive(q_THD[t, h], k_UGD[:seen, h * G // H], v_UGD[:seen, h * G // H]) for h in range(H)]
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def naive_prompts(q_THD: Tensor, k_KGD: Tensor, v_KGD: Tensor, gate_H: Tensor) -> Tensor:
    """g · softmax(q·k_aᵀ/√D)·v_a of one sequence; every position sees every row."""
    H, G = q_THD.shape[1], k_KGD.shape[1]
    return torch.stack(
        [
            torch.stack(
                [gate_H[h] * naive(q_HD[h], k_KGD[:, h * G // H], v_KGD[:, h * G // H]) for h in range(H)]
            )
            for q_HD in q_THD
        ]
    )


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rounded to `dtype`, so that both sides start from the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_equals_naive(
    ours: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Values, and every input's gradient of a random functional of them."""
    dtype = inputs[0].dtype
    mine = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    actual, expected = ours(*mine), formula(*exact)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    weight = randn(*expected.shape, seed=99, dtype=dtype)
    (actual * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for x, y in zip(mine, exact, strict=True):
        assert x.grad is not None
        wanted = torch.zeros_like(y) if y.grad is None else y.grad  # None: the formula never read it
        atol = TOLERANCE[dtype] * max(1.0, float(wanted.abs().amax()) if wanted.numel() else 1.0)
        torch.testing.assert_close(x.grad.double(), wanted, atol=atol, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize(("T", "U"), [(1, 1), (1, 9), (2, 2), (7, 7), (3, 11), (10, 11)])
def test_causal_attention(T: int, U: int, H: int, G: int, D: int, dtype: torch.dtype):
    shapes = [(T, H, D), (U, G, D), (U, G, D)]
    inputs = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    assert_equals_naive(causal_attention, naive_causal, inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize(
    ("K", "lens"), [(0, [0, 0]), (1, [1, 0]), (10, [10, 3, 0]), (20, [1, 20])], ids=lambda x: str(x)
)
def test_prompt_attention(K: int, lens: list[int], T: int, H: int, G: int, D: int, dtype: torch.dtype):
    """Ragged: each sequence sees its own number of rows, and no gradient reaches the padding."""
    B = len(lens)
    shapes = [(B, T, H, D), (B, K, G, D), (B, K, G, D), (B, H)]
    inputs = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]

    def formula(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return torch.stack([naive_prompts(q[b], k[b, :n], v[b, :n], gate[b]) for b, n in enumerate(lens)])

    def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return prompt_attention(q, k, v, torch.tensor(lens), gate)

    assert_equals_naive(ours, formula, inputs)


def test_prompts_shared_by_all_sequences():
    """One slot for B sequences: the gradients of all of them add up in it."""
    B, K, T, H, G, D = 3, 10, 5, 6, 2, 64
    shapes = [(B, T, H, D), (1, K, G, D), (1, K, G, D), (1, H)]
    inputs = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]

    def formula(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return torch.stack([naive_prompts(q[b], k[0, :7], v[0, :7], gate[0]) for b in range(B)])

    def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return prompt_attention(q, k, v, torch.tensor([7]), gate)

    assert_equals_naive(ours, formula, inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_single_prompt_row_is_its_value_times_the_gate(dtype: torch.dtype):
    """A softmax over one row is one, whatever the query: the prompt adds g·v_a."""
    q, k, v = (randn(1, 3, 2, 64, seed=i, dtype=dtype) for i in range(3))
    gate = torch.tensor([[0.5, -2.0]], dtype=dtype)
    out = prompt_attention(q, k[:, :1], v[:, :1], torch.tensor([1]), gate)
    assert torch.equal(out, (gate[:, None, :, None] * v[:, :1]).expand_as(out))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_prompts_add_exactly_zero(dtype: torch.dtype):
    q, k, v = (randn(2, 10, 2, 64, seed=i, dtype=dtype) for i in range(3))
    gate = torch.ones(2, 2, dtype=dtype)
    assert not prompt_attention(q, k, v, torch.tensor([0, 10]), gate)[0].any()
    assert not prompt_attention(q, k, v, torch.tensor([10, 10]), 0 * gate).any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_lengths_mean_no_padding(dtype: torch.dtype):
    q, k, v = (randn(2, 10, 2, 64, seed=i, dtype=dtype) for i in range(3))
    gate = randn(2, 2, seed=3, dtype=dtype)
    full = prompt_attention(q, k, v, torch.tensor([10, 10]), gate)
    assert torch.equal(prompt_attention(q, k, v, None, gate), full)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_scores_stay_finite_and_exact(scale: float):
    """Softmaxes subtract their maximum: scores far beyond exp's range pick the largest row."""
    q, k, v = (
        scale * randn(1, 3, 2, 64, seed=0),
        scale * randn(1, 10, 2, 64, seed=1),
        randn(1, 10, 2, 64, seed=2),
    )
    gate = randn(1, 2, seed=3)
    out = prompt_attention(q.float(), k.float(), v.float(), torch.tensor([7]), gate.float())[0]
    q, k, v = (x.float().double() for x in (q, k, v))
    torch.testing.assert_close(
        out.double(), naive_prompts(q[0], k[0, :7], v[0, :7], gate[0]), atol=1e-4, rtol=1e-4
    )
    causal = causal_attention(q[0].float(), k[0, :3].float(), v[0, :3].float())
    torch.testing.assert_close(causal.double(), naive_causal(q[0], k[0, :3], v[0, :3]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("slots", [None, 1, 3])
def test_dense_attend_is_causal_attention_plus_gated_prompts(
    slots: int | None, H: int, G: int, dtype: torch.dtype
):
    """Layer 0 has no prompts, layer 1 has some; one slot for all sequences or one for each."""
    B, T, K, D, L = 3, 6, 10, 64, 2
    shapes = [(B * T, H, D), (B * T, G, D), (B * T, G, D)]
    if slots:
        shapes += [(slots, L, K, G, D), (slots, L, K, G, D), (slots, L, H)]
    inputs = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    lens = torch.tensor([[0, 10], [0, 0], [0, 4]])[: slots or 1]

    def ours(layer: int, q: Tensor, k: Tensor, v: Tensor, *prompts: Tensor) -> Tensor:
        return DenseAttend(B, Prompts(prompts[0], prompts[1], lens, prompts[2]) if prompts else None)(
            layer, q, k, v
        )

    def formula(layer: int, q: Tensor, k: Tensor, v: Tensor, *prompts: Tensor) -> Tensor:
        rows = []
        for b in range(B):
            mine = slice(b * T, (b + 1) * T)
            out = naive_causal(q[mine], k[mine], v[mine])
            if prompts:
                s = b if slots == B else 0
                n = int(lens[s, layer])
                k_a, v_a, gate = (x[s, layer] for x in prompts)
                out = out + naive_prompts(q[mine], k_a[:n], v_a[:n], gate)
            rows.append(out)
        return torch.cat(rows)

    assert_equals_naive(lambda *x: ours(1, *x), lambda *x: formula(1, *x), inputs)
    # A layer without prompts is the plain causal attention, bit for bit.
    plain = DenseAttend(B)(0, *inputs[:3])
    assert torch.equal(ours(0, *inputs), plain)
    torch.testing.assert_close(
        plain.double(),
        formula(0, *(x.double() for x in inputs)),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )
