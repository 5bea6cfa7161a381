"""Captions without a language model: what a trained captioner should do better than.

Shapes: J images, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import normalize

from models.adapter_config import VisionConfig
from models.vision.efficientnet import imagenet_labels, load_efficientnet
from models.vision.encoder import VisionEncoder, load_encoder
from models.vision.images import decode_image
from train.data.features import FeatureCache, cache_folder, encode_images, feature_shape
from train.errors import EvaluationError
from train.evaluation.captions import Captioner, Picture

_BATCH = 16
_LEAST_SPREAD = 1e-3  # so that a feature that never differs divides by something


def imagenet_captioner() -> Captioner:
    """The likeliest of ImageNet's 1000 names, as the classifier expert reads it, however unsure."""

    def caption(images: Sequence[Path]) -> list[str]:
        encoder, labels = load_efficientnet(), imagenet_labels()
        found: list[str] = []
        for start in range(0, len(images), _BATCH):
            some = [encoder.preprocess(decode_image(path.read_bytes())) for path in images[start:][:_BATCH]]
            found += [labels[i] for i in encoder.logits(torch.stack(some)).argmax(1).tolist()]
        return found

    return caption


def nearest_captioner(pictures: Sequence[Picture], encoder_name: str, cache_dir: Path) -> Captioner:
    """The first caption of the nearest of `pictures`, by the cosine of the encoder's global features.

    Each feature is brought to mean 0 and spread 1 over `pictures` first, which makes a stronger baseline:
    scales that are pooled side by side differ in size.

    Features are kept where trainings keep them.
    """

    def caption(images: Sequence[Path]) -> list[str]:
        encoder = load_encoder(encoder_name)
        known_JF = global_features([picture.path for picture in pictures], encoder, cache_dir)
        spread_F, mean_F = torch.std_mean(known_JF, dim=0, correction=0)
        spread_F += _LEAST_SPREAD
        near_JF = normalize((known_JF - mean_F) / spread_F)
        asked_JF = normalize((global_features(images, encoder, cache_dir) - mean_F) / spread_F)
        return [pictures[int((near_JF @ asked_F).argmax())].references[0] for asked_F in asked_JF]

    return caption


def global_features(images: Sequence[Path], encoder: VisionEncoder, cache_dir: Path) -> Tensor:
    """[J, F] of image files. Raises EvaluationError for one that cannot be read."""
    config = VisionConfig(
        encoder=encoder.name,
        features="global",
        feature_dim=encoder.global_dim,
        projector="linear",
        hidden_size=encoder.global_dim,
        num_tokens=1,
        fusion="early",
        layers=(0,),
    )
    folder = cache_folder(cache_dir, encoder, config)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        cache = FeatureCache(folder, feature_shape(encoder, config))
        found = encode_images(images, encoder, config, cache, 0, lambda count: None)
    for image, one in zip(images, found, strict=True):
        if isinstance(one, str):
            raise EvaluationError(f"{image}: {one}")
    rows = [cache.row(digest) for digest in found if isinstance(digest, bytes)]
    return torch.from_numpy(cache.open()[np.array(rows, np.int64)])
