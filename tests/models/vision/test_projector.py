"""Projectors against formulas written out here in float64 numpy."""

import math

import numpy as np
import pytest
import torch

from models.adapter_config import VisionConfig
from models.errors import ModelError
from models.vision.encoder import EncoderDims, FeatureDims
from models.vision.projector import build_projector

DIMS = EncoderDims(token_dim=6, num_tokens=5, global_dim=9)
WIDTHS = {"global": 9, "tokens": 6}
HIDDEN = 8


def vision(**changes: object) -> VisionConfig:
    defaults = {
        "encoder": "efficientnet-lite0",
        "features": "global",
        "projector": "mlp",
        "fusion": "early",
        "layers": (0,),
        "num_tokens": 3,
        "hidden_size": 12,
    }
    defaults["feature_dim"] = WIDTHS[str(changes.get("features", "global"))]
    return VisionConfig.model_validate(defaults | changes)


def queries(**changes: object) -> VisionConfig:
    defaults = {"features": "tokens", "projector": "query_blocks", "num_blocks": 2, "num_heads": 3}
    return vision(**(defaults | changes))


def randomised(config: VisionConfig) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """A float64 projector with random values everywhere, norms and biases too, and its weights."""
    projector = build_projector(config, DIMS, HIDDEN).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    return projector, {key: value.detach().numpy() for key, value in projector.named_parameters()}


def layer_norm(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(x: np.ndarray, w: dict[str, np.ndarray], name: str, heads: int) -> np.ndarray:
    """One head and one query at a time."""
    batch, length, width = x.shape
    size = width // heads
    qkv, mixed = linear(x, w, f"{name}.qkv"), np.zeros_like(x)
    for b in range(batch):
        for h in range(heads):
            q, k, v = (qkv[b, :, part * width + h * size :][:, :size] for part in range(3))
            for t in range(length):
                weights = np.exp(k @ q[t] / math.sqrt(size))
                mixed[b, t, h * size : (h + 1) * size] = weights @ v / weights.sum()
    return linear(mixed, w, f"{name}.proj")


def features_of(config: VisionConfig, batch: int = 2) -> torch.Tensor:
    shape = (batch, 9) if config.features == "global" else (batch, 5, 6)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize(("features", "rows"), [("global", 3), ("tokens", 5)])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_linear_and_mlp(kind: str, features: str, rows: int, input_norm: bool) -> None:
    width = 12 if kind == "mlp" else WIDTHS[features]
    config = vision(
        projector=kind, features=features, num_tokens=rows, hidden_size=width, input_norm=input_norm
    )
    projector, w = randomised(config)
    x = features_of(config)
    expected = layer_norm(x.numpy(), w, "input_norm") if input_norm else x.numpy()
    if kind == "linear":
        expected = linear(expected, w, "proj")
    else:
        expected = linear(gelu(linear(expected, w, "fc1")), w, "fc2")
    np.testing.assert_allclose(projector(x).detach(), expected.reshape(2, rows, HIDDEN), rtol=1e-10)


@pytest.mark.parametrize("features", ["tokens", "global"])
def test_query_blocks(features: str) -> None:
    config = queries(features=features)
    projector, w = randomised(config)
    tokens = features_of(config)
    x = tokens.numpy() if features == "tokens" else tokens.numpy()[:, None]
    x = layer_norm(linear(x, w, "input_proj"), w, "input_norm")
    x = np.concatenate([np.broadcast_to(w["query"], (2, 3, 12)), x], axis=1)
    for i in range(2):
        block = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items()}
        x = x + attention(layer_norm(x, block, "norm1"), block, "attn", heads=3)
        x = x + linear(gelu(linear(layer_norm(x, block, "norm2"), block, "mlp.fc1")), block, "mlp.fc2")
    expected = layer_norm(linear(x[:, :3], w, "output_proj"), w, "output_norm")
    np.testing.assert_allclose(projector(tokens).detach(), expected, rtol=1e-9, atol=1e-12)


def projector_shapes(config: VisionConfig, dims: FeatureDims, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Of every tensor in the state dict, without allocating one."""
    with torch.device("meta"):
        projector = build_projector(config, dims, hidden_size)
    return {key: tuple(tensor.shape) for key, tensor in projector.state_dict().items()}


def test_the_released_multimodal_adapters_shapes() -> None:
    """63.1 M parameters of the BIAS-7B file are mostly these; shapes as its key list has them."""
    config = queries(num_tokens=10, feature_dim=768, hidden_size=768, num_blocks=8, num_heads=16)
    shapes = projector_shapes(config, EncoderDims(token_dim=768, num_tokens=257, global_dim=4096), 4096)
    block = {
        "norm1.weight": (768,),
        "norm1.bias": (768,),
        "norm2.weight": (768,),
        "norm2.bias": (768,),
        "attn.qkv.weight": (2304, 768),
        "attn.qkv.bias": (2304,),
        "attn.proj.weight": (768, 768),
        "attn.proj.bias": (768,),
        "mlp.fc1.weight": (3072, 768),
        "mlp.fc1.bias": (3072,),
        "mlp.fc2.weight": (768, 3072),
        "mlp.fc2.bias": (768,),
    }
    assert shapes == {
        "query": (10, 768),
        "input_proj.weight": (768, 768),
        "input_proj.bias": (768,),
        "input_norm.weight": (768,),
        "input_norm.bias": (768,),
        "output_proj.weight": (4096, 768),
        "output_proj.bias": (4096,),
        "output_norm.weight": (4096,),
        "output_norm.bias": (4096,),
    } | {f"blocks.{i}.{key}": shape for i in range(8) for key, shape in block.items()}


def test_shapes_of_the_others() -> None:
    assert projector_shapes(vision(projector="linear", hidden_size=9, input_norm=True), DIMS, HIDDEN) == {
        "input_norm.weight": (9,),
        "input_norm.bias": (9,),
        "proj.weight": (24, 9),
        "proj.bias": (24,),
    }
    assert projector_shapes(vision(features="tokens", num_tokens=5), DIMS, HIDDEN) == {
        "fc1.weight": (12, 6),
        "fc1.bias": (12,),
        "fc2.weight": (8, 12),
        "fc2.bias": (8,),
    }


@pytest.mark.parametrize("config", [vision(), vision(features="tokens", num_tokens=5), queries()])
def test_every_parameter_learns(config: VisionConfig) -> None:
    projector, _ = randomised(config)
    weights = torch.randn(HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (projector(features_of(config)) * weights).sum().backward()
    assert [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (queries(num_heads=5), "`num_heads` that divides `hidden_size`"),
        (queries(num_blocks=0), "`num_blocks` ≥ 1"),
        (queries(input_norm=True), "input norm of its own"),
        (vision(features="tokens", num_tokens=4), "a row per token, 5 with"),
        (
            vision(feature_dim=768),
            "`feature_dim` is 768, but the encoder 'efficientnet-lite0' gives 9 `global`",
        ),
        (vision(projector="linear", hidden_size=12), "features' own, 9,"),
    ],
)
def test_what_does_not_fit_is_refused(config: VisionConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_projector(config, DIMS, HIDDEN)
