"""The base's logits are transformers' logits on the same weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.attention import DenseAttend
from models.config import ModelConfig
from models.errors import CheckpointError
from models.llama import Llama


def canonical_weights(model: Llama):
    return {name: place.clone() for name, place in model._places()}


def transformers_twin(model: Llama) -> LlamaForCausalLM:
    """transformers' model with this model's weights."""
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling:
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
    names = {
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
    state = {}
    for name, tensor in canonical_weights(model).items():
        *prefix, last, _ = name.split(".")
        state[".".join([*(["model", *prefix] if prefix else []), names[last], "weight"])] = tensor
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin.eval()


@torch.no_grad()
def test_logits_equal_transformers(base: Llama):
    tokens_BT = torch.randint(0, base.config.vocab_size, (3, 60), generator=torch.Generator().manual_seed(1))
    positions_N = torch.arange(60).repeat(3)
    hidden_NC = base(tokens_BT.flatten(), positions_N, DenseAttend(3))
    ours = base.logits(hidden_NC).unflatten(0, (3, 60))
    theirs = transformers_twin(base)(tokens_BT).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_load_names_what_does_not_fit(config: ModelConfig, base: Llama):
    weights = canonical_weights(base)
    fresh = Llama(config).load(weights.items())
    assert all(torch.equal(value, weights[name]) for name, value in canonical_weights(fresh).items())

    with pytest.raises(CheckpointError, match=r"missing.*layers\.2\.w3\.weight"):
        Llama(config).load((n, t) for n, t in weights.items() if n != "layers.2.w3.weight")
    with pytest.raises(CheckpointError, match=r"unexpected.*layers\.9\.wq"):
        Llama(config).load([*weights.items(), ("layers.9.wq.weight", torch.zeros(1))])
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[3\]"):
        Llama(config).load((n, t[:3] if n == "norm.weight" else t) for n, t in weights.items())
