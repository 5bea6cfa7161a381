"""LitGPT's own files (tests/fixtures/make_litgpt.py) as the oracle takes them, by hand from the names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from oracle import Oracle, Weights
from safetensors.torch import load_file
from torch import Tensor

from models.adapter import base_spec
from models.adapter_config import LINEARS, AdapterConfig
from models.config import ModelConfig

FIXTURES = Path(__file__).parent / "fixtures" / "litgpt"
CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=512,
)
_KEYS = {"wo": "attn.proj", "w1": "mlp.fc_1", "w2": "mlp.proj", "w3": "mlp.fc_2"}


def base_weights() -> dict[str, Tensor]:
    """The base that LitGPT ran on, under canonical names; rows half-rotated."""
    return load_file(FIXTURES / "base.safetensors")


def weights_file(kind: str, version: str) -> Path:
    return FIXTURES / f"{kind}-{version}" / f"lit_model.pth.{kind}"


def litgpt_oracle(kind: str, version: str) -> Oracle:
    """The oracle of one fixture. 0.5.5 and later regroup the prompts' rows, and concatenate fused vectors."""
    regrouped = int(version.split(".")[2]) >= 5
    state = torch.load(weights_file(kind, version), weights_only=True)["model"]
    first = next(i for i in range(CONFIG.num_layers) if f"transformer.h.{i}.attn.adapter_wte.weight" in state)
    prompted = range(first, CONFIG.num_layers)
    rows = [state[f"transformer.h.{i}.attn.adapter_wte.weight"] for i in prompted]
    gates = [state[f"transformer.h.{i}.attn.gating_factor"].flatten() for i in prompted]
    spec: dict[str, object] = {
        "base": base_spec(CONFIG).model_dump(),
        "prompt": {
            "length": len(rows[0]),
            "layers": prompted,
            "projection": "regrouped" if regrouped else "wk_wv",
        },
        "gate": {"activation": "raw"},
    }
    own = {"prompt": torch.stack(rows), "gate": torch.stack(gates)}
    if kind == "adapter_v2":
        spec |= {
            "norms": True,
            "final_norm": True,
            "head": True,
            "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
        }
        own |= _v2(state, regrouped)
    return Oracle(CONFIG, _double(base_weights()), AdapterConfig.model_validate(spec), _double(own))


def _v2(state: dict[str, Tensor], regrouped: bool) -> dict[str, Tensor]:
    layers = [f"transformer.h.{i}" for i in range(CONFIG.num_layers)]
    own = {
        "attention_norm": torch.stack([state[f"{layer}.norm_1.weight"] for layer in layers]),
        "feed_forward_norm": torch.stack([state[f"{layer}.norm_2.weight"] for layer in layers]),
        "final_norm": state["transformer.ln_f.weight"],
    }
    H, G, D = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim
    for part in ("bias", "scale"):
        own[f"head_{part}"] = state[f"lm_head.adapter_{part}"][: CONFIG.vocab_size]
        for name, key in _KEYS.items():
            own[f"{part}.{name}"] = torch.stack([state[f"{layer}.{key}.adapter_{part}"] for layer in layers])
        fused = "attn.qkv" if regrouped else "attn.attn"
        heads = [state[f"{layer}.{fused}.adapter_{part}"].view(H + 2 * G, D) for layer in layers]
        order = list(range(H + 2 * G))
        if not regrouped:  # each group's queries, then its key, then its value
            size = H // G + 2
            starts = range(0, H + 2 * G, size)
            order = [s + j for s in starts for j in range(size - 2)]
            order += [s + size - 2 for s in starts] + [s + size - 1 for s in starts]
        for name, mine in (("wq", order[:H]), ("wk", order[H : H + G]), ("wv", order[H + G :])):
            own[f"{part}.{name}"] = torch.stack([whole[mine].flatten() for whole in heads])
    return own


def _double(weights: dict[str, Tensor]) -> Weights:
    return {name: tensor.double().numpy().astype(np.float64) for name, tensor in weights.items()}
