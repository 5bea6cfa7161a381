"""A base that a real worker can load in a moment: random weights, a real tokenizer, a chat template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from service import ON_VLLM
from support import GQA, huggingface_weights, random_adapter, random_base
from tokenizer_files import byte_level_backend, write_byte_level

from models.adapter import base_spec
from models.adapter_config import AdapterConfig, GateConfig, PromptConfig, ScaleBiasConfig, VisionConfig
from models.checkpoints.native import save_adapter
from models.config import ModelConfig
from models.llama import Llama

HEAD_DIM = 32 if ON_VLLM else GQA.head_dim  # vLLM's attention on a CPU has none so small


def tiny_config(positions: int = 512, head_dim: int = HEAD_DIM) -> ModelConfig:
    vocab_size = byte_level_backend().get_vocab_size()
    return replace(GQA, vocab_size=vocab_size, max_position_embeddings=positions, head_dim=head_dim)


def write_tiny_base(
    folder: Path,
    num_layers: int | None = None,
    positions: int = 512,
    head_dim: int = HEAD_DIM,
    hidden_size: int = GQA.hidden_size,
) -> Llama:
    """A Hugging Face folder; returns the model that is in it."""
    config = replace(tiny_config(positions, head_dim), hidden_size=hidden_size)
    if num_layers is not None:
        config = replace(config, num_layers=num_layers)
    base = random_base(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_byte_level(folder)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "rms_norm_eps": config.rms_norm_eps,
                "rope_theta": config.rope_theta,
                "max_position_embeddings": config.max_position_embeddings,
                "tie_word_embeddings": config.tie_word_embeddings,
                "hidden_act": "silu",
            }
        )
    )
    save_file(huggingface_weights(base), folder / "model.safetensors", metadata={"format": "pt"})
    return base


def adapter_config(kind: str, head_dim: int = HEAD_DIM) -> AdapterConfig:
    """`v1`, `v2`, or `sight` (V1 multimodal on EfficientNet's global features)."""
    spec = base_spec(tiny_config(head_dim=head_dim))
    match kind:
        case "v1":
            return AdapterConfig(
                base=spec, prompt=PromptConfig(length=6, layers=(1, 2, 3)), template="alpaca"
            )
        case "v2":
            return AdapterConfig(
                base=spec,
                prompt=PromptConfig(length=4, layers=(2, 3)),
                gate=GateConfig(activation="raw"),
                norms=True,
                scale_bias=ScaleBiasConfig(
                    scale="output", scale_targets=("wq", "w1"), bias_targets=("wq", "w2")
                ),
            )
        case "sight":
            return AdapterConfig(
                base=spec,
                prompt=PromptConfig(length=5, layers=(1, 2, 3)),
                vision=VisionConfig(
                    encoder="efficientnet-lite0",
                    features="global",
                    projector="mlp",
                    fusion="add",
                    layers=(1, 2, 3),
                    num_tokens=1,
                    feature_dim=1752,
                    hidden_size=32,
                    input_norm=True,
                ),
            )
    raise KeyError(kind)


def write_adapter(folder: Path, kind: str, seed: int = 0, head_dim: int = HEAD_DIM) -> None:
    """A native adapter folder with seeded weights far from zero."""
    torch.manual_seed(seed)
    save_adapter(random_adapter(adapter_config(kind, head_dim), seed=seed), folder)
