"""Adapter files of the reference code, built key by key from the formats' facts and seeded values.

Nothing here comes from `models.checkpoints`: a test compares what that package reads with what the
oracle computes from the same tensors in the file's own layout (Meta's interleaved RoPE rows).

A `Sample` holds the file's tensors; the same tensors stacked under native names, still in the file's
row order; and the configuration that the file means.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models.adapter import base_spec, linear_shape
from models.adapter_config import LINEARS, AdapterConfig
from models.config import ModelConfig

K = 3  # prompt rows; the released files have 10
ATTENTION = ("wq", "wk", "wv", "wo")
BIASED = ("wq", "wo", "w1", "w2", "w3")


@dataclass
class Sample:
    config: AdapterConfig
    tensors: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)


class Values:
    """Seeded values of a trained adapter's magnitude."""

    def __init__(self, seed: int = 7) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def around(self, mean: float, spread: float, *shape: int) -> Tensor:
        return mean + spread * torch.randn(shape, generator=self._generator)


def save_sample(sample: Sample, path: Path) -> Path:
    """In the container that files of this kind come in."""
    tensors = {key: tensor.clone() for key, tensor in sample.tensors.items()}
    lora, biases = sample.config.lora, sample.config.scale_bias.bias_targets
    value: dict[str, object] = {"model": tensors}
    if sample.config.prompt is not None and sample.config.vision is None:
        value = dict(tensors)
    elif sample.config.vision is not None and biases:
        value["config"] = {"w_bias": True, "w_lora": lora is not None, "lora_rank": lora.rank if lora else 16}
    torch.save(value, path)
    return path


def module_of(name: str) -> str:
    return "attention" if name in ATTENTION else "feed_forward"


def add_prompts(sample: Sample, values: Values, prefix: str, query: str = "adapter_query.weight") -> None:
    """The prompt table, and gates in all layers, of which the upper ones are used."""
    spec, prompt = sample.config.base, sample.config.prompt
    assert prompt is not None
    rows = values.around(0, 1, len(prompt.layers) * prompt.length, spec.hidden_size)
    gates = values.around(0, 1, spec.num_layers, spec.num_heads)
    sample.tensors[query] = rows
    sample.own["prompt"] = rows.view(len(prompt.layers), prompt.length, -1)
    sample.own["gate"] = gates[list(prompt.layers)]
    for i in range(spec.num_layers):
        sample.tensors[f"{prefix}layers.{i}.attention.gate"] = gates[i].view(1, -1, 1, 1)


def add_norms(sample: Sample, values: Values, prefix: str, final: bool = True) -> None:
    L, C = sample.config.base.num_layers, sample.config.base.hidden_size
    for native, theirs in (("attention_norm", "attention_norm"), ("feed_forward_norm", "ffn_norm")):
        sample.own[native] = values.around(1, 0.2, L, C)
        for i in range(L):
            sample.tensors[f"{prefix}layers.{i}.{theirs}.weight"] = sample.own[native][i]
    if final:
        sample.own["final_norm"] = values.around(1, 0.2, C)
        sample.tensors[f"{prefix}norm.weight"] = sample.own["final_norm"]


def reference_v1(
    config: ModelConfig, query: str = "adapter_query.weight", activation: str = "tanh", length: int = K
) -> Sample:
    sample = Sample(
        AdapterConfig.model_validate(
            {
                "base": base_spec(config).model_dump(),
                "prompt": {"length": length, "layers": range(1, config.num_layers)},
                "gate": {"activation": activation},
                "template": "alpaca" if query == "adapter_query.weight" else "caption",
            }
        )
    )
    add_prompts(sample, Values(), "", query)
    return sample


def reference_7b(
    config: ModelConfig,
    bias: bool = True,
    norms: bool = True,
    lora: int = 0,
    encoder: str = "open_clip:ViT-L-14:openai",
    F: int = 10,
) -> Sample:
    """`lora` is the rank, 0 for a file without; a caption file has no biases, one of training's first stage
    no norms either. `F`: the encoder's features."""
    E, blocks = 32, 2
    top = range(1, config.num_layers)
    spec = {
        "base": base_spec(config).model_dump(),
        "prompt": {"length": K, "layers": top},
        "gate": {"new_gate": bool(lora)},
        "norms": norms,
        "final_norm": norms,
        "scale_bias": {"bias_targets": BIASED if bias else ()},
        "lora": {"rank": lora, "targets": LINEARS} if lora else None,
        "vision": {
            "encoder": encoder,
            "features": "tokens",
            "projector": "query_blocks",
            "fusion": "add",
            "layers": top,
            "num_tokens": K,
            "feature_dim": F,
            "hidden_size": E,
            "num_blocks": blocks,
            "num_heads": 16,
            "color": "bgr",
            "no_image": "zero",
        },
        "template": "alpaca",
    }
    sample, values = Sample(AdapterConfig.model_validate(spec)), Values()
    add_prompts(sample, values, "llama.")
    if norms:
        add_norms(sample, values, "llama.")
    base = sample.config.base
    for name in BIASED if bias else ():
        sample.own[f"bias.{name}"] = values.around(0, 0.2, config.num_layers, linear_shape(base, name)[0])
        for i in range(config.num_layers):
            key = f"llama.layers.{i}.{module_of(name)}.{name}.bias"
            sample.tensors[key] = sample.own[f"bias.{name}"][i]
    if lora:
        _add_lora(sample, values, lora)
    _add_projector(sample, values, F, E, blocks)
    return sample


def _add_lora(sample: Sample, values: Values, rank: int) -> None:
    base = sample.config.base
    L = base.num_layers
    new_gates = values.around(1, 0.2, L)
    sample.own["new_gate"] = new_gates[1:]
    for i in range(L):
        sample.tensors[f"llama.layers.{i}.attention.new_gate"] = new_gates[i].view(1, 1, 1, 1)
    for name in LINEARS:
        out_features, in_features = linear_shape(base, name)
        a = values.around(0, in_features**-0.5, L, rank, in_features)
        b = values.around(0, 0.5, L, out_features, rank)
        sample.own |= {f"lora.{name}.a": a, f"lora.{name}.b": b}
        for i in range(L):
            prefix = f"llama.layers.{i}.{module_of(name)}.lora_{name}"
            sample.tensors |= {f"{prefix}_l1.weight": a[i], f"{prefix}_l2.weight": b[i]}


def _add_projector(sample: Sample, values: Values, F: int, E: int, blocks: int) -> None:
    C = sample.config.base.hidden_size

    def add(native: str, key: str, value: Tensor) -> None:
        sample.own[f"vision.{native}"] = sample.tensors[key] = value

    def linear(native: str, key: str, out_features: int, in_features: int) -> None:
        add(
            f"{native}.weight",
            f"{key}.weight",
            values.around(0, in_features**-0.5, out_features, in_features),
        )
        add(f"{native}.bias", f"{key}.bias", values.around(0, 0.2, out_features))

    def norm(native: str, key: str, size: int) -> None:
        add(f"{native}.weight", f"{key}.weight", values.around(1, 0.2, size))
        add(f"{native}.bias", f"{key}.bias", values.around(0, 0.2, size))

    add("query", "visual_query.weight", values.around(0, 1, K, E))
    linear("input_proj", "clip_proj", E, F)
    norm("input_norm", "clip_proj_norm", E)
    for i in range(blocks):
        norm(f"blocks.{i}.norm1", f"visual_blocks.{i}.norm1", E)
        linear(f"blocks.{i}.attn.qkv", f"visual_blocks.{i}.attn.qkv", 3 * E, E)
        linear(f"blocks.{i}.attn.proj", f"visual_blocks.{i}.attn.proj", E, E)
        norm(f"blocks.{i}.norm2", f"visual_blocks.{i}.norm2", E)
        linear(f"blocks.{i}.mlp.fc1", f"visual_blocks.{i}.mlp.fc1", 4 * E, E)
        linear(f"blocks.{i}.mlp.fc2", f"visual_blocks.{i}.mlp.fc2", E, 4 * E)
    linear("output_proj", "visual_proj", C, E)
    norm("output_norm", "visual_proj_norm", C)


def chat_65b(config: ModelConfig, final_norm: bool = True) -> Sample:
    sample = Sample(
        AdapterConfig.model_validate(
            {
                "base": base_spec(config).model_dump(),
                "norms": True,
                "final_norm": final_norm,
                "scale_bias": {"scale": "input", "scale_targets": LINEARS, "bias_targets": LINEARS},
                "template": "vicuna_v1",
            }
        )
    )
    values, L = Values(), config.num_layers
    add_norms(sample, values, "", final_norm)
    for name in LINEARS:
        out_features, in_features = linear_shape(sample.config.base, name)
        sample.own[f"bias.{name}"] = values.around(0, 0.2, L, out_features)
        sample.own[f"scale.{name}"] = values.around(1, 0.2, L, in_features)
        for i in range(L):
            for part in ("bias", "scale"):
                key = f"layers.{i}.{module_of(name)}.{name}_{part}"
                sample.tensors[key] = sample.own[f"{part}.{name}"][i]
    return sample


def base_weights(config: ModelConfig, prefix: str) -> dict[str, Tensor]:
    """The frozen base inside a training checkpoint. Its values are NaN: nobody may read them."""
    C, V = config.hidden_size, config.vocab_size
    shapes = {"tok_embeddings.weight": (V, C), "output.weight": (V, C), "rope.freqs": (config.head_dim // 2,)}
    for i in range(config.num_layers):
        for name in LINEARS:
            shapes[f"layers.{i}.{module_of(name)}.{name}.weight"] = linear_shape(base_spec(config), name)
    nan = float("nan")
    return {f"{prefix}{key}": torch.full((1,), nan).expand(shape) for key, shape in shapes.items()}
