"""From a name to an expert. Each one's libraries are imported only when it is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experts.contract import Expert, ExpertError
from models.vision.images import DEFAULT_LIMITS, ImageLimits

EXPERT_NAMES = ("ocr", "classifier", "caption")


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """`num_threads` 0: one per core. `paddle_models`: see `experts.paddle_ocr`; `blip_model`: a folder."""

    limits: ImageLimits = DEFAULT_LIMITS
    num_threads: int = 0
    ocr_engine: Literal["rapidocr", "paddleocr"] = "rapidocr"
    ocr_min_confidence: float = 0.6
    paddle_models: Path | None = None
    classifier_min_confidence: float = 0.3
    blip_model: Path | None = None


def build_expert(name: str, options: ExpertOptions) -> Expert:
    """Not yet loaded. Raises `ExpertError` for an unknown name, a missing package or missing weights."""
    match name:
        case "ocr":
            return _ocr(options)
        case "classifier":
            return _classifier(options)
        case "caption":
            return _caption(options)
        case _:
            raise ExpertError(f"no expert is called {name!r}; there are {', '.join(EXPERT_NAMES)}")


def _ocr(options: ExpertOptions) -> Expert:
    if options.ocr_engine == "paddleocr":
        from experts.paddle_ocr import PaddleOcrExpert

        return PaddleOcrExpert(
            options.paddle_models, options.ocr_min_confidence, options.num_threads, options.limits
        )
    from experts.ocr import OcrExpert

    return OcrExpert(options.ocr_min_confidence, options.num_threads, options.limits)


def _classifier(options: ExpertOptions) -> Expert:
    from experts.classifier import ClassifierExpert

    return ClassifierExpert(options.classifier_min_confidence, options.num_threads, options.limits)


def _caption(options: ExpertOptions) -> Expert:
    if options.blip_model is None:
        raise ExpertError(
            "the expert 'caption' needs BLIP weights here (`blip_model`, a folder); "
            "the server offers it by itself where an adapter called 'caption' is served"
        )
    from experts.blip import BlipExpert

    return BlipExpert(options.blip_model, options.num_threads, options.limits)
