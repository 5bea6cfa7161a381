"""What the reference repository's files share: Meta's names, and the base weights in full checkpoints."""

from __future__ import annotations

import re

from models.adapter_config import BaseSpec, LinearName
from models.checkpoints.adapter_table import Entry, linear_sizes, rope_heads

LINEAR_KEYS: dict[LinearName, str] = {
    "wq": "attention.wq",
    "wk": "attention.wk",
    "wv": "attention.wv",
    "wo": "attention.wo",
    "w1": "feed_forward.w1",
    "w2": "feed_forward.w2",
    "w3": "feed_forward.w3",
}

# A training checkpoint (`checkpoint-N.pth`) holds the frozen base and CLIP as well: none of the adapter's.
BASE_WEIGHTS = (
    r"(llama\.)?((tok_embeddings|output)\.weight|rope\.freqs"
    r"|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight)|clip\..*"
)
BASE_NORMS = r"(llama\.)?(norm|layers\.\d+\.(attention_norm|ffn_norm))\.weight"


def ignored(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


def norm_entries(base: BaseSpec, prefix: str) -> tuple[Entry, ...]:
    """Both norms of every layer."""
    size, layers = (base.hidden_size,), tuple(range(base.num_layers))
    return (
        Entry("attention_norm", f"{prefix}layers.{{i}}.attention_norm.weight", size, size, layers),
        Entry("feed_forward_norm", f"{prefix}layers.{{i}}.ffn_norm.weight", size, size, layers),
    )


def final_norm_entry(base: BaseSpec, prefix: str) -> Entry:
    size = (base.hidden_size,)
    return Entry("final_norm", f"{prefix}norm.weight", size, size)


def bias_entry(base: BaseSpec, name: LinearName, key: str) -> Entry:
    """One linear's bias in every layer; `key` has `{i}`."""
    size = (linear_sizes(base)[name][0],)
    return Entry(f"bias.{name}", key, size, size, tuple(range(base.num_layers)), heads=rope_heads(base, name))


def gate_entry(base: BaseSpec, layers: tuple[int, ...], per: str, key: str) -> Entry:
    """Gates per head, [1, H, 1, 1] in the file, or one per layer, [1]."""
    shape, row = ((1, base.num_heads, 1, 1), (base.num_heads,)) if per == "head" else ((1,), ())
    return Entry("gate", key, shape, row, layers)
