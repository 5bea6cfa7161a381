"""CLIP encoders through open_clip: `open_clip:MODEL:PRETRAINED`.

MODEL is a name that open_clip knows; PRETRAINED one of its tags, which it downloads, or the path of a
local checkpoint. OpenAI's weights in a local file need the model's `-quickgelu` variant; the tag `openai`
brings it by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models.errors import CheckpointError, ModelError
from models.vision.encoder import Features, run_to_end
from models.vision.preprocess import Color, center_crop, to_pixels

_SCALES = 4  # blocks whose class token goes into the global features


class ClipEncoder:
    """`VisionEncoder` over the image half of a CLIP ViT (`open_clip.transformer.VisionTransformer`).

    Tokens: ln_post of class token and patches, each through the joint projection, as the released 7B
    multimodal adapters read them (257×768 of ViT-L/14). Global features: the class token after each
    quarter of the blocks, through ln_post.
    """

    def __init__(self, name: str, version: str, visual: Any, device: torch.device | str = "cpu") -> None:
        _check_supported(name, visual)
        self.name = name
        self.version = version
        self._visual = visual.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)
        config = visual.preprocess_cfg
        self._mean, self._std = config["mean"], config["std"]
        self.image_size: int = visual.image_size[0]
        width, self.token_dim = visual.proj.shape
        self.num_tokens: int = visual.positional_embedding.shape[0]
        depth = len(visual.transformer.resblocks)
        self._blocks = sorted({round(depth * (i + 1) / _SCALES) - 1 for i in range(_SCALES)} - {-1})
        self.global_dim: int = len(self._blocks) * width

    def preprocess(self, image: Image.Image, color: Color = "rgb") -> Tensor:
        """An RGB image → [3, image_size, image_size] float32."""
        return to_pixels(center_crop(image, self.image_size, self.image_size), self._mean, self._std, color)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, num_tokens, token_dim], the class token first."""
        return run_to_end(self.by_layers("tokens", pixels_BCHW))

    def global_features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, global_dim]."""
        return run_to_end(self.by_layers("global", pixels_BCHW))

    @torch.no_grad()
    def by_layers(self, features: Features, pixels_BCHW: Tensor) -> Generator[None, None, Tensor]:
        visual, hidden = self._visual, []
        x = visual._embeds(pixels_BCHW.to(self._device))
        batch_first = visual.transformer.batch_first
        if not batch_first:
            x = x.transpose(0, 1)
        for i, block in enumerate(visual.transformer.resblocks):
            x = block(x)
            if i in self._blocks:
                hidden.append(x if batch_first else x.transpose(0, 1))
            yield
        if features == "tokens":
            tokens_BTF: Tensor = visual.ln_post(hidden[-1]) @ visual.proj
            return tokens_BTF
        return torch.cat([visual.ln_post(x_BTF[:, 0]) for x_BTF in hidden], dim=-1)


def load_clip(name: str, device: torch.device | str = "cpu") -> ClipEncoder:
    """Raises `ModelError` for a missing package or an unknown model, `CheckpointError` for bad weights."""
    open_clip = _import_open_clip()
    model_name, _, pretrained = name.removeprefix("open_clip:").partition(":")
    if model_name not in open_clip.list_models():
        raise ModelError(f"{name!r}: open_clip has no model {model_name!r}; see open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if not pretrained or (pretrained not in tags and not Path(pretrained).is_file()):
        raise ModelError(
            f"{name!r}: an encoder needs trained weights; append one of open_clip's tags "
            f"({', '.join(tags) or 'none for this model'}) or the path of a checkpoint"
        )
    try:
        model = open_clip.create_model(model_name, pretrained, device="cpu", weights_only=True)
    except Exception as error:  # torch, safetensors, the hub client: each has errors of its own
        raise CheckpointError(f"{name!r}: open_clip cannot load {pretrained!r}: {error}") from error
    return ClipEncoder(name, _digest(model.visual), model.visual, device)


def _import_open_clip() -> Any:
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise ModelError(
            f"encoders named 'open_clip:…' need open_clip ({error}); install llama-adapter-server[clip], "
            "with a torchvision built for the same CPU or CUDA as torch"
        ) from error
    return open_clip


def _check_supported(name: str, visual: Any) -> None:
    config = getattr(visual, "preprocess_cfg", {})
    plain_vit = hasattr(visual, "_embeds") and getattr(visual, "attn_pool", None) is None
    if not plain_vit or getattr(visual, "proj", None) is None:
        raise ModelError(f"{name!r}: only CLIP's plain vision transformers with a class token are supported")
    if config.get("resize_mode") != "shortest" or config.get("interpolation") != "bicubic":
        raise ModelError(f"{name!r}: only bicubic resizing of the shorter side is supported, not {config}")
    if len(set(visual.image_size)) != 1:
        raise ModelError(f"{name!r}: only square images are supported, not {visual.image_size}")


def _digest(visual: Any) -> str:
    """Of the weights themselves, so that one tag or path with other weights is another version."""
    digest = hashlib.sha256()
    for key, tensor in sorted(visual.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
