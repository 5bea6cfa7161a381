"""What an image shows, as one of ImageNet's 1000 names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image

from experts.contract import ExpertError, Reading
from experts.local import LocalExpert
from models.errors import ModelError
from models.vision.efficientnet import NAME, WEIGHTS_SHA256, imagenet_labels, load_efficientnet
from models.vision.images import DEFAULT_LIMITS, ImageLimits

if TYPE_CHECKING:
    from models.vision.efficientnet import EfficientNetLite0


class ClassifierExpert(LocalExpert):
    """The likeliest name with its probability, `espresso (96%)`; empty below `min_confidence`.

    `num_threads` sets torch's threads, which are the process's.
    """

    def __init__(
        self, min_confidence: float = 0.3, num_threads: int = 0, limits: ImageLimits = DEFAULT_LIMITS
    ) -> None:
        super().__init__("classifier", f"{NAME}-{WEIGHTS_SHA256[:12]}-min{min_confidence:g}", limits)
        self._min_confidence = min_confidence
        self._num_threads = num_threads
        self._labels = imagenet_labels()
        self._encoder: EfficientNetLite0

    def _load(self) -> None:
        if self._num_threads:
            torch.set_num_threads(self._num_threads)
        try:
            self._encoder = load_efficientnet()
        except ModelError as error:
            raise ExpertError(str(error)) from error

    def _describe(self, image: Image.Image) -> Reading:
        logits = self._encoder.logits(self._encoder.preprocess(image)[None])
        confidence, index = (value.item() for value in logits.softmax(-1)[0].max(0))
        if confidence < self._min_confidence:
            return Reading("", confidence)
        return Reading(f"{self._labels[int(index)]} ({confidence:.0%})", confidence)
