"""From an RGB image to an encoder's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Color = Literal["rgb", "bgr"]


def center_crop(image: Image.Image, size: int, resize: int) -> Image.Image:
    """The central `size`×`size` pixels of the image, its shorter side first resized to `resize` (bicubic).

    Rounds as torchvision's Resize and CenterCrop do, but never makes the image between the two, whose
    size a hostile aspect ratio would blow up: the resampler reads the crop's own box of the original.
    """
    short = min(image.size)
    whole = [int(resize * side / short) for side in image.size]
    start = [round((side - size) / 2) for side in whole]
    scale = [original / resized for original, resized in zip(image.size, whole, strict=True)]
    left, top = (start[i] * scale[i] for i in (0, 1))
    right, bottom = (min((start[i] + size) * scale[i], image.size[i]) for i in (0, 1))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


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
