"""Small random bases and adapters that every test tree uses."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.config import ModelConfig, RopeScaling
from models.llama import Llama

MHA = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=4,
    num_heads=6,
    num_kv_heads=6,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
)
GQA = replace(MHA, num_kv_heads=2, tie_word_embeddings=True)
LLAMA3 = replace(
    MHA,
    num_kv_heads=3,
    head_dim=16,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
)
CONFIGS = {"mha": MHA, "gqa": GQA, "llama3": LLAMA3}


def random_base(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Llama:
    """A base with seeded weights of a trained model's magnitude."""
    generator = torch.Generator().manual_seed(seed)
    base = Llama(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * values)
            else:
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
    return base
