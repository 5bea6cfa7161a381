"""A training pass over a few sequences, and an adapter that changes all there is."""

from __future__ import annotations

from typing import Any

import torch

from models.adapter import Adapter, base_spec
from models.adapter_config import AdapterConfig, LoraConfig, PromptConfig, ScaleBiasConfig
from models.config import ModelConfig
from train.data.batches import Pass

LENS = (9, 6, 3)


def config_of(model: ModelConfig, **changes: Any) -> AdapterConfig:
    fields: dict[str, Any] = {
        "base": base_spec(model),
        "prompt": PromptConfig(length=3, layers=(2, 3)),
        "norms": True,
        "final_norm": True,
        "head": True,
        "scale_bias": ScaleBiasConfig(scale="output", scale_targets=("wk", "w2"), bias_targets=("wv", "w1")),
        "lora": LoraConfig(rank=2, targets=("wq", "wo")),
    }
    return AdapterConfig(**(fields | changes))


def make_pass(vocab: int, lens: tuple[int, ...] = LENS) -> Pass:
    """Everything from each sequence's third token on is a target."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocab, (sum(lens),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lens])
    targets = (positions >= 2).nonzero()[:, 0]
    return Pass(tokens, positions, lens, targets - 1, tokens[targets], None, (-1,) * len(lens))


def grads_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
