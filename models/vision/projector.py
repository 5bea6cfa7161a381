"""Projectors: an encoder's features → visual prompt rows [B, num_tokens, C].

Parameter names are the checkpoint's (docs/design.md) without the leading `vision.`.
Shapes: B images, T tokens, F features, n `num_tokens`, E the projector's width, C the base's hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapter_config import VisionConfig
from models.errors import ModelError
from models.vision.encoder import FeatureDims, check_features

_LAYER_NORM_EPS = 1e-5
_MLP_RATIO = 4


class Linear(nn.Module):
    """One Linear; of a global vector it gives all n rows at once, of tokens a row each."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input_norm = nn.LayerNorm(config.feature_dim, eps=_LAYER_NORM_EPS) if config.input_norm else None
        self.proj = nn.Linear(config.feature_dim, _out_dim(config, hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        """[B, F] or [B, n, F] → [B, n, C]."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        return _rows(self.proj(features), self.hidden_size)


class Mlp(nn.Module):
    """Linear-GELU-Linear, rows as `Linear`'s."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input_norm = nn.LayerNorm(config.feature_dim, eps=_LAYER_NORM_EPS) if config.input_norm else None
        self.fc1 = nn.Linear(config.feature_dim, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, _out_dim(config, hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        """[B, F] or [B, n, F] → [B, n, C]."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        return _rows(self.fc2(F.gelu(self.fc1(features))), self.hidden_size)


class QueryBlocks(nn.Module):
    """n learned queries read the tokens through pre-norm ViT blocks (the released 7B code's facts).

    V = LN(W_out · Blocks([query; LN(W_in · tokens)])[:n])
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_proj = nn.Linear(config.feature_dim, width)
        self.input_norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.query = nn.Parameter(torch.randn(config.num_tokens, width))  # unit scale, as normed tokens have
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.num_blocks))
        self.output_proj = nn.Linear(width, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps=_LAYER_NORM_EPS)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, F], or [B, F] as one token, → [B, n, C]."""
        tokens_BTF = features.unsqueeze(1) if features.dim() == 2 else features
        tokens_BTE = self.input_norm(self.input_proj(tokens_BTF))
        query_BnE = self.query.expand(tokens_BTE.shape[0], -1, -1)
        x_BTE = torch.cat([query_BnE, tokens_BTE], dim=1)
        for block in self.blocks:
            x_BTE = block(x_BTE)
        rows: Tensor = self.output_norm(self.output_proj(x_BTE[:, : self.query.shape[0]]))
        return rows


class Block(nn.Module):
    """A pre-norm ViT block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.mlp = FeedForward(width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        x_BTE = x_BTE + self.attn(self.norm1(x_BTE))
        out: Tensor = x_BTE + self.mlp(self.norm2(x_BTE))
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are all queries, all keys, all values, heads inside."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        qkv = self.qkv(x_BTE).unflatten(-1, (3, self.num_heads, -1))
        q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4)
        mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD)
        out: Tensor = self.proj(mixed_BHTD.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, _MLP_RATIO * width)
        self.fc2 = nn.Linear(_MLP_RATIO * width, width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BTE)))
        return out


Projector = Linear | Mlp | QueryBlocks


def build_projector(config: VisionConfig, dims: FeatureDims, hidden_size: int) -> Projector:
    """The projector of `config` for features of `dims` and a base of `hidden_size` C, freshly initialised.

    Works under `torch.device("meta")`. Raises `ModelError` where config and encoder do not fit.
    """
    check_features(config, dims)
    _check(config)
    match config.projector:
        case "linear":
            return Linear(config, hidden_size)
        case "mlp":
            return Mlp(config, hidden_size)
        case "query_blocks":
            return QueryBlocks(config, hidden_size)


def _check(config: VisionConfig) -> None:
    if config.projector == "query_blocks":
        if config.num_blocks < 1 or config.num_heads < 1 or config.hidden_size % config.num_heads:
            raise ModelError(
                "vision: `query_blocks` needs `num_blocks` ≥ 1 and a `num_heads` that divides `hidden_size`, "
                f"not {config.num_blocks}, {config.num_heads} and {config.hidden_size}"
            )
        if config.input_norm:
            raise ModelError("vision: `query_blocks` has an input norm of its own; leave `input_norm` false")
    elif config.projector == "linear" and config.hidden_size != config.feature_dim:
        raise ModelError(
            "vision: `hidden_size` of a `linear` projector is the features' own, "
            f"{config.feature_dim}, not {config.hidden_size}"
        )


def _out_dim(config: VisionConfig, hidden_size: int) -> int:
    return hidden_size * (config.num_tokens if config.features == "global" else 1)


def _rows(out: Tensor, hidden_size: int) -> Tensor:
    """[B, n·C] or [B, n, C] → [B, n, C]."""
    return out.reshape(out.shape[0], -1, hidden_size)
