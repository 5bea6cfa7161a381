"""From an RGB image to an encoder's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Color = Literal["rgb", "bgr"]


def center_crop(image: Image.Image, size: int, crop: float = 1.0) -> Image.Image:
    """The central square, `crop` of the shorter side wide, as `size`×`size` pixels (bicubic).

    With `crop` 1 it equals a resize of the shorter side to `size` followed by a crop, but for a rounding
    and without the image between the two, whose size a hostile aspect ratio could blow up.
    """
    side = min(image.size) * crop
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_pixels(image: Image.Image, mean: Sequence[float], std: Sequence[float], color: Color) -> Tensor:
    """[3, H, W] float32: (value/255 − mean) / std by channel, in the order that `color` says.

    With `bgr` the channels are swapped before the normalisation, so that blue gets red's mean: what a
    model sees whose images were read in BGR and then treated as RGB.
    """
    pixels_HWC = np.array(image.convert("RGB"), dtype=np.float32) / 255.0
    if color == "bgr":
        pixels_HWC = pixels_HWC[:, :, ::-1]
    normalised_HWC = (pixels_HWC - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised_HWC.transpose(2, 0, 1)))
