"""Writes a base's canonical weights as the formats have them, by other code than the readers'."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from models.config import ModelConfig

# Rows are multiples of 32 values, so that every simple quantisation fits.
TINY = ModelConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=128,
)

_META = {
    "embed": "tok_embeddings",
    "norm": "norm",
    "lm_head": "output",
    "wq": "attention.wq",
    "wk": "attention.wk",
    "wv": "attention.wv",
    "wo": "attention.wo",
    "w1": "feed_forward.w1",
    "w2": "feed_forward.w2",
    "w3": "feed_forward.w3",
    "attention_norm": "attention_norm",
    "feed_forward_norm": "ffn_norm",
}
_GGUF = {
    "embed": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
    "attention_norm": "attn_norm",
    "feed_forward_norm": "ffn_norm",
}


def random_weights(config: ModelConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Seeded weights under the names and shapes of docs/design.md, spelled out."""
    generator = torch.Generator().manual_seed(seed)
    c, q, k = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, c), "norm": (c,)}
    for layer in range(config.num_layers):
        for name, shape in {
            "wq": (q, c),
            "wk": (k, c),
            "wv": (k, c),
            "wo": (c, q),
            "w1": (config.intermediate_size, c),
            "w2": (c, config.intermediate_size),
            "w3": (config.intermediate_size, c),
            "attention_norm": (c,),
            "feed_forward_norm": (c,),
        }.items():
            shapes[f"layers.{layer}.{name}"] = shape
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, c)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def to_interleaved(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """Row by row: row i and row i + D/2 of a head become rows 2i and 2i + 1."""
    if name.split(".")[-2] not in ("wq", "wk"):
        return weight
    size, half = config.head_dim, config.head_dim // 2
    rows = []
    for head in range(weight.shape[0] // size):
        for i in range(half):
            rows += [weight[head * size + i], weight[head * size + i + half]]
    return torch.stack(rows)


def write_meta(
    folder: Path, weights: dict[str, Tensor], config: ModelConfig, shards: int = 1, **params: object
) -> None:
    """`params.json` and `shards` files, split as Meta's model parallelism does."""
    folder.mkdir(exist_ok=True)
    parts: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(config.head_dim // 2)} for _ in range(shards)]
    for name, weight in weights.items():
        *prefix, last, _ = name.split(".")
        key = ".".join([*prefix, _META[last], "weight"])
        weight = to_interleaved(name, weight, config)
        axis = {"embed": 1, "wo": 1, "w2": 1}.get(last, 0)
        pieces = weight.chunk(shards, axis) if weight.dim() == 2 else [weight] * shards
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = piece.clone()
    for index, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{index:02d}.pth")
    values = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "multiple_of": 32,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(values | params))


def gguf_writer(file: Path, config: ModelConfig, architecture: str = "llama") -> GGUFWriter:
    """A writer with the metadata of such a model and no tensors yet."""
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    return writer


def add_gguf_weights(
    writer: GGUFWriter,
    weights: dict[str, Tensor],
    config: ModelConfig,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> None:
    """Norms stay float32, as llama.cpp has them; the rest is quantised to `kind`."""
    for name, weight in weights.items():
        *prefix, last, _ = name.split(".")
        key = ".".join([*(["blk", prefix[1]] if prefix else []), _GGUF[last], "weight"])
        values = to_interleaved(name, weight, config).numpy()
        if weight.dim() == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(key, values)
        elif kind == GGMLQuantizationType.F16:
            writer.add_tensor(key, values.astype(np.float16))
        else:
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)


def close_gguf(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    file: Path,
    weights: dict[str, Tensor],
    config: ModelConfig = TINY,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> None:
    writer = gguf_writer(file, config)
    add_gguf_weights(writer, weights, config, kind)
    close_gguf(writer)
