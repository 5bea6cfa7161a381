"""Text in images, read by RapidOCR (PP-OCR models on ONNX Runtime, which its package brings along)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from PIL import Image

from experts.contract import ExpertError, Reading
from experts.local import LocalExpert
from experts.reading_order import Piece, compose
from models.vision.images import DEFAULT_LIMITS, ImageLimits

# Larger pictures are scaled down before text is looked for, smaller ones stay as they are: RapidOCR's own
# rule, the shorter side up to 736, reads the same on text of 12 px and more and costs three times as much.
_DETECT_SIDE = 1280
_LONGEST_SIDE = 2000
_SHORTEST_SIDE = 64


class OcrExpert(LocalExpert):
    """Lines of text in reading order; empty where none is sure enough."""

    def __init__(
        self, min_confidence: float = 0.6, num_threads: int = 0, limits: ImageLimits = DEFAULT_LIMITS
    ) -> None:
        super().__init__("ocr", f"rapidocr-{_installed()}-min{min_confidence:g}", limits)
        self._min_confidence = min_confidence
        self._num_threads = num_threads
        self._engine: Any = None

    def _load(self) -> None:
        from rapidocr import RapidOCR

        threads = self._num_threads or -1  # -1: ONNX Runtime's own choice
        self._engine = RapidOCR(
            params={
                "Global.use_cls": False,  # doubles the time and only helps upside-down pages
                "Global.text_score": 0.0,  # `compose` leaves out what is unsure, by the setting
                "Global.log_level": "critical",  # it logs each image without text as a warning
                "Det.limit_type": "max",
                "Det.limit_side_len": _DETECT_SIDE,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": threads,
            }
        )

    def _describe(self, image: Image.Image) -> Reading:
        result = self._engine(as_bgr(image))
        if result.boxes is None:
            return Reading("")
        found = zip(result.boxes.tolist(), result.txts, result.scores, strict=True)
        return compose((Piece(*piece) for piece in found), self._min_confidence)


def as_bgr(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[H, W, 3] in BGR, no side longer than 2000 and none shorter than 64 (white is added).

    The bounds keep a hostile aspect ratio from making the detector's input huge or empty.
    """
    image = image.copy()
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    canvas = Image.new("RGB", (max(image.width, _SHORTEST_SIDE), max(image.height, _SHORTEST_SIDE)), "white")
    canvas.paste(image)
    return np.ascontiguousarray(np.asarray(canvas)[:, :, ::-1])


def _installed() -> str:
    try:
        return version("rapidocr")
    except PackageNotFoundError as error:
        raise ExpertError("the expert 'ocr' needs rapidocr; install llama-adapter-server[experts]") from error
