"""The shape of a LLaMA-architecture base model."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3's frequency-dependent RoPE scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not (0 < self.low_freq_factor < self.high_freq_factor < math.inf and 1 <= self.factor < math.inf):
            raise ValueError(f"{self} is no rotation; it needs 0 < low < high < inf and 1 <= factor < inf")


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """Positions divided by `factor` (`rope_type: linear`), as in Vicuna's and LongChat's long contexts."""

    factor: float

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"{self} is no rotation; it needs 1 <= factor < inf")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that the forward pass and the caches need to know. Names as in Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | LinearRopeScaling | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        if not 1 <= self.rope_theta < math.inf:
            raise ValueError(f"rope_theta {self.rope_theta} is below 1; frequencies would grow without end")
        if self.max_position_embeddings > 1 << 24:  # for each of which vLLM keeps a rotation
            raise ValueError(f"max_position_embeddings {self.max_position_embeddings} is over {1 << 24}")
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps {self.rms_norm_eps} is not a positive, finite number")
