"""The packed pass equals the plain one, values and gradients, on ragged shapes."""

import pytest
import torch
from support import CONFIGS, random_adapter, random_base

from models.adapter import base_spec
from models.adapter_config import AdapterConfig, PromptConfig, VisionConfig
from models.attention import DenseAttend, Prompts, causal_attention, prompt_attention
from models.config import ModelConfig
from train import attention as module
from train.attention import PackedAttend

LENS = (5, 1, 9, 4)


def vision_config(config: ModelConfig) -> AdapterConfig:
    """Static prompts above, visual tokens of another number below."""
    return AdapterConfig(
        base=base_spec(config),
        prompt=PromptConfig(length=3, layers=(2, 3)),
        vision=VisionConfig(
            encoder="efficientnet-lite0",
            features="global",
            projector="linear",
            fusion="early",
            layers=(0, 1),
            num_tokens=5,
            feature_dim=7,
            hidden_size=7,
        ),
    )


def plain(
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lens: tuple[int, ...],
    p: Prompts,
    slots: list[int],
) -> torch.Tensor:
    """Sequence by sequence, by the definition's own functions."""
    parts = []
    for slot, q_THD, k_TGD, v_TGD in zip(slots, q.split(lens), k.split(lens), v.split(lens), strict=True):
        own = slice(slot, slot + 1)
        prompted = prompt_attention(
            q_THD[None],
            p.k_SLKGD[own, layer],
            p.v_SLKGD[own, layer],
            p.len_SL[own, layer],
            p.gate_SLH[own, layer],
        )
        parts.append(causal_attention(q_THD, k_TGD, v_TGD) + prompted[0])
    return torch.cat(parts)


@pytest.fixture(params=["one block", "blocks of four", "fused kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How causal attention is computed: nothing of it may be seen in the result."""
    if request.param == "blocks of four":
        monkeypatch.setattr(module, "_BLOCK", 4)
    if request.param == "fused kernel":
        monkeypatch.setattr(module, "_LONGEST", 4)
    return str(request.param)


@pytest.mark.parametrize("lens", [LENS, (6, 6, 6, 6)])
@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.usefixtures("way")
def test_equals_the_definition(config: ModelConfig, lens: tuple[int, ...], sees: bool):
    torch.manual_seed(0)
    base, adapter = random_base(config), random_adapter(vision_config(config))
    visual = adapter.see(torch.randn(3, 7)) if sees else None
    prompts = adapter.prompts(base, visual)
    slots = [2, 0, 1, 2] if sees else [0, 0, 0, 0]
    shapes = [(config.num_heads,), (config.num_kv_heads,), (config.num_kv_heads,)]
    qkv = [torch.randn(sum(lens), *shape, config.head_dim, requires_grad=True) for shape in shapes]
    packed = PackedAttend(lens, prompts, torch.tensor(slots) if sees else None, torch.device("cpu"))
    leaves = [*qkv, adapter.prompt, adapter.gate] + ([*adapter.vision.parameters()] if sees else [])
    for layer in range(config.num_layers):
        ours = packed(layer, *qkv)
        theirs = plain(layer, *qkv, lens, prompts, slots)
        torch.testing.assert_close(ours, theirs)
        weight = torch.randn_like(ours)
        grads = [
            torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True, allow_unused=True)
            for out in (ours, theirs)
        ]
        for one, two in zip(*grads, strict=True):
            assert (one is None) == (two is None) or not (one if one is not None else two).any()
            if one is not None and two is not None:
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_a_slot_without_prompts_adds_nothing():
    config = CONFIGS["gqa"]
    base, adapter = random_base(config), random_adapter(vision_config(config))
    with_image, without = adapter.prompts(base, adapter.see(torch.randn(1, 7))), adapter.prompts(base)
    both = Prompts(
        *(torch.cat([getattr(p, name) for p in (with_image, without)]) for name in with_image.__dict__)
    )
    q = torch.randn(10, config.num_heads, config.head_dim)
    k, v = torch.randn(2, 10, config.num_kv_heads, config.head_dim).unbind()
    out = PackedAttend((5, 5), both, torch.tensor([0, 1]), torch.device("cpu"))(0, q, k, v)
    bare = DenseAttend(2)(0, q, k, v)
    torch.testing.assert_close(out[5:], bare[5:])
    assert (out[:5] - bare[:5]).abs().max() > 0.01


def test_half_precision_stays_near():
    config = CONFIGS["gqa"]
    base = random_base(config, torch.bfloat16)
    adapter = random_adapter(vision_config(config))
    prompts = adapter.prompts(base, adapter.see(torch.randn(4, 7)))
    q, k, v = (
        torch.randn(sum(LENS), heads, config.head_dim, dtype=torch.bfloat16)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    )
    slots = [0, 1, 2, 3]
    ours = PackedAttend(LENS, prompts, torch.tensor(slots), torch.device("cpu"))(0, q, k, v)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain(0, q, k, v, LENS, prompts, slots), atol=0.03, rtol=0.03)


@pytest.mark.parametrize(("T", "K", "gated"), [(7, 7, False), (8, 8, False), (7, 5, True), (1, 1, True)])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_values(
    monkeypatch: pytest.MonkeyPatch, T: int, K: int, gated: bool, groups: int
):
    """Against differences of the values, in float64."""
    monkeypatch.setattr(module, "_BLOCK", 4)
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 4, T, 3), (2, 4 // groups, K, 3), (2, 4 // groups, K, 3)] + ([(2, 4)] if gated else [])
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    attention = module.prompt_attention if gated else module.causal_attention
    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in inputs])


def test_gradients_in_bfloat16_stay_near_exact_ones():
    """Scores are float32: rounded to bfloat16 they would be off by up to 0.06 where they are near 16."""
    generator = torch.Generator().manual_seed(4)
    exact = [
        4 * torch.randn(1, heads, 40, 16, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)
    ]
    half = [x.bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in half]
    weight = torch.randn(1, 4, 40, 16, dtype=torch.float64, generator=generator)
    grads = [
        torch.autograd.grad((module.causal_attention(*qkv) * weight.to(qkv[0].dtype)).sum(), qkv)
        for qkv in (half, exact)
    ]
    for one, two in zip(*grads, strict=True):
        assert (one - two).abs().max() < 0.02 * two.abs().max()
