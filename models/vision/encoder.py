"""One contract for every visual encoder, and the way from a name to one.

Shapes: B images, T tokens of one image, F features, H×W pixels (both `image_size`).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from models.adapter_config import VisionConfig
from models.errors import ModelError
from models.vision.preprocess import Color

T = TypeVar("T")
Features = Literal["global", "tokens"]


class FeatureDims(Protocol):
    """What a projector has to know of an encoder."""

    @property
    def token_dim(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def global_dim(self) -> int: ...


@dataclass(frozen=True, slots=True)
class EncoderDims:
    """`FeatureDims` for whoever has weights to lay out but no encoder."""

    token_dim: int
    num_tokens: int
    global_dim: int


class VisionEncoder(FeatureDims, Protocol):
    """A frozen encoder. Its features carry no gradient, and what follows them may be trained.

    `version` changes whenever the features may: it belongs into every key that caches them.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def image_size(self) -> int: ...

    def preprocess(self, image: Image.Image, color: Color = "rgb") -> Tensor:
        """An RGB image → [3, H, W] float32 on the CPU, channels in the order that `color` says."""

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] → the encoder's last feature sequence [B, num_tokens, token_dim]."""

    def global_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] → pooled features of several scales, concatenated [B, global_dim] (V1 eq. 9)."""

    def by_layers(self, features: Features, pixels_BCHW: Tensor) -> Generator[None, None, Tensor]:
        """`tokens` or `global_features`, yielding after each layer: something else can be done between."""


def run_to_end(layers: Generator[None, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(layers)
        except StopIteration as done:
            found: T = done.value
            return found


def load_encoder(name: str, device: torch.device | str = "cpu") -> VisionEncoder:
    """The encoder of a `VisionConfig.encoder` name, in float32 and frozen.

    Raises `ModelError` for an unknown name or a missing package, `CheckpointError` for bad weights.
    """
    if name == "efficientnet-lite0":
        from models.vision.efficientnet import load_efficientnet

        return load_efficientnet(device)
    if name.startswith("open_clip:"):
        from models.vision.clip import load_clip

        return load_clip(name, device)
    raise ModelError(
        f"no visual encoder is called {name!r}; use 'efficientnet-lite0' or 'open_clip:MODEL:PRETRAINED'"
    )


def check_features(config: VisionConfig, dims: FeatureDims) -> None:
    """Raises `ModelError` where an encoder's features are not those that `config` was made for."""
    width = dims.token_dim if config.features == "tokens" else dims.global_dim
    if config.feature_dim != width:
        raise ModelError(
            f"vision: `feature_dim` is {config.feature_dim}, but the encoder {config.encoder!r} gives "
            f"{width} `{config.features}` features; name the encoder that the adapter was trained with"
        )
    row_per_token = config.features == "tokens" and config.projector != "query_blocks"
    if row_per_token and config.num_tokens != dims.num_tokens:
        raise ModelError(
            f"vision: `{config.projector}` gives a row per token, {dims.num_tokens} with the encoder "
            f"{config.encoder!r}, so `num_tokens` cannot be {config.num_tokens}"
        )


def encode(config: VisionConfig, encoder: VisionEncoder, pixels_BCHW: Tensor) -> Tensor:
    """The features that `config` reads: [B, T, F] tokens or [B, F] global ones."""
    if config.features == "tokens":
        return encoder.tokens(pixels_BCHW)
    return encoder.global_features(pixels_BCHW)
