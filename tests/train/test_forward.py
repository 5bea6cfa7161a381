"""One pass: the loss is the plain one, gradients agree however it is split, and nothing is done twice."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import CONFIGS, random_adapter, random_base
from torch.nn import functional as F
from train_passes import config_of, grads_of, make_pass

from models.adaptation import OneAdapter
from models.adapter import Adapter
from models.adapter_config import ScaleBiasConfig
from models.attention import DenseAttend
from models.config import ModelConfig
from models.llama import Layer, Llama
from train import forward as module
from train.data.batches import Pass
from train.forward import Forward


def plain_loss(base: Llama, adapter: Adapter, batch: Pass) -> torch.Tensor:
    """Sequence by sequence, all logits, one summed cross-entropy."""
    total = torch.zeros(())
    for tokens in batch.tokens_N.split(batch.lens_B):
        adaptation = OneAdapter(adapter, base.dtype)
        attend = DenseAttend(1, adapter.prompts(base))
        logits = base.logits(base(tokens, torch.arange(len(tokens)), attend, adaptation), adaptation)
        total = total + F.cross_entropy(logits[1:-1], tokens[2:], reduction="sum")
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("logits", [1 << 24, 97 * 2])
def test_loss_and_gradients_are_the_plain_ones(
    config: ModelConfig, checkpointing: bool, logits: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_LOGITS", logits)  # the second: chunks of two targets
    base, adapter = random_base(config), random_adapter(config_of(config))
    batch = make_pass(config.vocab_size)
    expected = plain_loss(base, adapter, batch)
    expected.backward()
    wanted = grads_of(adapter)
    adapter.zero_grad()
    forward = Forward(base, adapter, None, live=False, checkpointing=checkpointing)
    loss = forward.backward(batch, 0.5)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(forward.loss(batch), expected.detach())
    ours = grads_of(adapter)
    assert ours.keys() == wanted.keys() == dict(adapter.named_parameters()).keys()
    for name, grad in ours.items():
        torch.testing.assert_close(2 * grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_gradients_add_up_over_passes():
    config = CONFIGS["gqa"]
    base, adapter = random_base(config), random_adapter(config_of(config))
    whole = make_pass(config.vocab_size)
    forward = Forward(base, adapter, None, live=False, checkpointing=False)
    forward.backward(whole, 1.0)
    wanted = grads_of(adapter)
    adapter.zero_grad()
    for start, end in ((0, 9), (9, 18)):
        inside = (whole.predicting_M >= start) & (whole.predicting_M < end)
        part = replace(
            whole,
            tokens_N=whole.tokens_N[start:end],
            positions_N=whole.positions_N[start:end],
            lens_B=(9,) if start == 0 else (6, 3),
            predicting_M=whole.predicting_M[inside] - start,
            targets_M=whole.targets_M[inside],
        )
        forward.backward(part, 1.0)
    for name, grad in grads_of(adapter).items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_no_graph_below_the_lowest_adapted_layer(monkeypatch: pytest.MonkeyPatch):
    """V1 in layers 2 and 3: what flows into layer 2 needs no gradient, the frozen base has none."""
    config = CONFIGS["gqa"]
    plain = {
        "norms": False,
        "final_norm": False,
        "head": False,
        "scale_bias": ScaleBiasConfig(),
        "lora": None,
    }
    base, adapter = random_base(config), random_adapter(config_of(config, **plain))
    inputs: dict[int, bool] = {}
    call = Layer.forward

    def watched(self: Layer, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        inputs[self.index] = x.requires_grad
        return call(self, x, *rest)

    monkeypatch.setattr(Layer, "forward", watched)
    Forward(base, adapter, None, live=False, checkpointing=False).backward(make_pass(config.vocab_size), 1.0)
    assert inputs == {0: False, 1: False, 2: False, 3: True}
    assert all(parameter.grad is None for parameter in base.parameters())


def test_head_is_computed_only_where_the_loss_is(monkeypatch: pytest.MonkeyPatch):
    config = CONFIGS["gqa"]
    base, adapter = random_base(config), random_adapter(config_of(config))
    rows: list[int] = []
    call = Llama.logits

    def watched(self: Llama, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(x))
        return call(self, x, *rest)

    monkeypatch.setattr(Llama, "logits", watched)
    batch = make_pass(config.vocab_size)
    Forward(base, adapter, None, live=False, checkpointing=False).backward(batch, 1.0)
    assert sum(rows) == len(batch.targets_M) == 12 < len(batch.tokens_N)


def test_prompts_are_made_anew_after_an_evaluation():
    """Prompt keys and values cached by an evaluation would freeze the prompts."""
    config = CONFIGS["gqa"]
    base, adapter = random_base(config), random_adapter(config_of(config))
    forward, batch = (
        Forward(base, adapter, None, live=False, checkpointing=False),
        make_pass(config.vocab_size),
    )
    before = forward.loss(batch)
    forward.backward(batch, 1.0)
    assert adapter.prompt.grad is not None
    assert adapter.prompt.grad.any()
    with torch.no_grad():
        adapter.prompt.add_(1.0)
    assert not math.isclose(forward.loss(batch), before, rel_tol=1e-4)


def test_fresh_adapter_has_the_bases_loss():
    config = CONFIGS["mha"]
    base = random_base(config)
    adapter = Adapter(config_of(config)).start_from(base)
    batch = make_pass(config.vocab_size)
    bare = torch.zeros(())
    with torch.no_grad():
        for tokens in batch.tokens_N.split(batch.lens_B):
            logits = base.logits(base(tokens, torch.arange(len(tokens)), DenseAttend(1)))
            bare += F.cross_entropy(logits[1:-1], tokens[2:], reduction="sum")
    torch.testing.assert_close(Forward(base, adapter, None, False, False).loss(batch), bare)


def test_bfloat16_base_trains_a_float32_adapter():
    config = CONFIGS["gqa"]
    adapter = random_adapter(config_of(config))
    batch = make_pass(config.vocab_size)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        adapter.zero_grad()
        Forward(random_base(config, dtype), adapter, None, False, False).backward(batch, 1 / 12)
        grads.append(torch.cat([grad.flatten() for grad in grads_of(adapter).values()]))
    assert grads[1].dtype == torch.float32
    assert F.cosine_similarity(*grads, dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_cross_entropy(dtype: torch.dtype):
    """Value and gradient, also where the target's probability is too small to be a number."""
    generator = torch.Generator().manual_seed(5)
    logits = (8 * torch.randn(37, 50, dtype=torch.float64, generator=generator)).to(dtype)
    logits[0, 0] = 300.0
    targets = torch.randint(50, (37,), generator=generator)
    targets[0] = 1
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value, expected = module._loss(ours, targets), F.cross_entropy(theirs, targets, reduction="sum")
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=0)
    (value * 0.37).backward()
    (expected * 0.37).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(
        ours.grad.double(), theirs.grad, atol=2e-3 if dtype == torch.bfloat16 else 1e-6, rtol=0
    )
