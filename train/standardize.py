"""Where a projector's input norm starts, where the recipe asks for more than ones and zeros."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapter import Adapter
from train.data.batches import ImageReader
from train.data.store import NO_IMAGE, Store
from train.errors import TrainError

_LEAST_SPREAD = 0.05  # of a feature that hardly ever differs: it shall not become the loudest


@torch.no_grad()
def standardize(adapter: Adapter, stores: Iterable[Store], read_image: ImageReader) -> None:
    """Let each feature leave the norm with mean 0 and spread 1 over the images that are trained on.

    The norm makes an image's features alike in sum only: scales of an encoder that are pooled side by side
    (V1 eq. 9) stay as far apart as they are, and of EfficientNet's the most telling ones are the faintest.
    Raises TrainError where there are not two images to compare.
    """
    norm = adapter.vision.input_norm
    assert isinstance(norm, nn.LayerNorm)
    features = [read_image(store, image, None) for store in stores for image in _trained_images(store)]
    if len(features) < 2:
        raise TrainError(
            f"init.features: `standardized` compares the images of the data, which have {len(features)}; set "
            "it to `plain`"
        )
    normed_JF = F.layer_norm(torch.stack(features), norm.normalized_shape).flatten(0, -2)
    spread_F, mean_F = torch.std_mean(normed_JF, dim=0)
    weight_F: Tensor = 1 / spread_F.clamp(min=_LEAST_SPREAD)
    norm.weight.copy_(weight_F)
    norm.bias.copy_(-mean_F * weight_F)


def _trained_images(store: Store) -> list[int]:
    images = np.unique(store.image_R[store.train])
    return [int(image) for image in images if image != NO_IMAGE]
