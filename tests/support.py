"""Small random bases and adapters that every test tree uses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.adapter import Adapter
from models.adapter_config import AdapterConfig
from models.config import LinearRopeScaling, ModelConfig, RopeScaling
from models.llama import Llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MHA = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=96,  # whole SIMD registers, or silu's last bits depend on memory layout
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


def random_adapter(config: AdapterConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    """An adapter of which every parameter is seeded, far from what changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parent, _, last = name.rpartition(".")
            if name in ("prompt", "gate", "vision.query"):
                parameter.copy_(values)
            elif "bias" in name:
                parameter.copy_(0.2 * values)
            elif "norm" in name or parent == "scale" or name in ("new_gate", "head_scale"):
                parameter.copy_(1 + 0.2 * values)
            else:  # matrices: the projector's and LoRA's
                parameter.copy_(values * (0.5 if last == "b" else 1) * parameter.shape[-1] ** -0.5)
    return adapter


def canonical_weights(model: Llama) -> dict[str, Tensor]:
    """A copy of the base's tensors under the names of docs/design.md."""
    return {name: place.clone() for name, place in model._places()}


_HUGGINGFACE = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def huggingface_weights(model: Llama) -> dict[str, Tensor]:
    """A copy of the base's tensors under Hugging Face's names."""
    state = {}
    for name, tensor in canonical_weights(model).items():
        *prefix, last, _ = name.split(".")
        state[".".join([*(["model", *prefix] if prefix else []), _HUGGINGFACE[last], "weight"])] = tensor
    return state


def transformers_twin(model: Llama) -> LlamaForCausalLM:
    """transformers' model with this model's weights, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import; most tests do without

    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if isinstance(c.rope_scaling, LinearRopeScaling):
        rope |= {"rope_type": "linear", "factor": c.rope_scaling.factor}
    elif c.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_max_position_embeddings,
        }
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=c.tie_word_embeddings,
            max_position_embeddings=c.max_position_embeddings,
        )
    )
    missing, unexpected = twin.load_state_dict(huggingface_weights(model), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin.eval()
