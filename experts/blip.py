"""A sentence on what an image shows, by BLIP (arXiv 2201.12086) from a local folder of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from experts.caption import one_sentence
from experts.contract import ExpertError, Reading
from experts.local import LocalExpert
from models.vision.images import DEFAULT_LIMITS, ImageLimits
from models.vision.preprocess import to_pixels

# BLIP's images are squeezed to a square and normalised with CLIP's constants.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_NEW_TOKENS = 40
_WEIGHTS = ("*.safetensors", "*.bin")


class BlipExpert(LocalExpert):
    """Takes the caption adapter's place as the expert `caption` where BLIP weights are at hand.

    `folder` is a Hugging Face folder of a `BlipForConditionalGeneration`; nothing is downloaded.
    """

    def __init__(self, folder: Path, num_threads: int = 0, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        super().__init__("caption", f"blip-{_digest(folder)}", limits)
        self._folder = folder
        self._num_threads = num_threads
        self._model: Any = None
        self._tokenizer: Any = None

    def _load(self) -> None:
        try:
            from transformers import AutoTokenizer, BlipForConditionalGeneration
        except ImportError as error:
            raise ExpertError(
                f"BLIP needs transformers ({error}); install llama-adapter-server[blip]"
            ) from error
        if self._num_threads:
            torch.set_num_threads(self._num_threads)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self._folder, local_files_only=True
            )  # a local folder # nosec B615
            model: Any = BlipForConditionalGeneration.from_pretrained(
                self._folder, local_files_only=True
            )  # a local folder # nosec B615
        except Exception as error:  # transformers raises whatever the file at fault makes it raise
            raise ExpertError(f"{self._folder}: not a usable BLIP model: {error}") from error
        self._model = model.eval()

    @torch.inference_mode()
    def _describe(self, image: Image.Image) -> Reading:
        size = self._model.config.vision_config.image_size
        square = image.resize((size, size), Image.Resampling.BICUBIC)
        pixels_1CHW = to_pixels(square, _MEAN, _STD, "rgb")[None]
        output = self._model.generate(
            pixel_values=pixels_1CHW, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False, num_beams=1
        )
        return Reading(one_sentence(self._tokenizer.decode(output[0, 1:], skip_special_tokens=True)))


def _digest(folder: Path) -> str:
    """Of names, sizes and times of the weight files: hashing gigabytes would delay every start."""
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not files:
        raise ExpertError(f"{folder}: holds no BLIP weights ({' or '.join(_WEIGHTS)})")
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]
