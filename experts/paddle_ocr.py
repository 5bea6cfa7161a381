"""Text in images, read by PaddleOCR with its ONNX Runtime engine: no paddlepaddle needed.

PaddleOCR fetches its own models when it is given none. Where there is no network, `make_model_folder` lays
out those that RapidOCR's package holds the way PaddleOCR wants them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from PIL import Image

from experts.contract import ExpertError, Reading
from experts.local import LocalExpert
from experts.ocr import as_bgr
from experts.reading_order import Piece, compose
from models.vision.images import DEFAULT_LIMITS, ImageLimits

DETECTION, RECOGNITION = "PP-OCRv6_small_det", "PP-OCRv6_small_rec"
_RAPIDOCR_FILES = {DETECTION: "PP-OCRv6_det_small.onnx", RECOGNITION: "PP-OCRv6_rec_small.onnx"}


class PaddleOcrExpert(LocalExpert):
    """As `experts.ocr.OcrExpert`. `models` is a folder of `make_model_folder`'s; None: PaddleOCR's own."""

    def __init__(
        self,
        models: Path | None = None,
        min_confidence: float = 0.6,
        num_threads: int = 0,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        source = "own" if models is None else models.name
        super().__init__("ocr", f"paddleocr-{_installed()}-{source}-min{min_confidence:g}", limits)
        self._models = models
        self._min_confidence = min_confidence
        self._num_threads = num_threads
        self._engine: Any = None

    def _load(self) -> None:
        # PaddleX otherwise asks every model host at start whether it can be reached.
        os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
        from paddleocr import PaddleOCR

        logging.getLogger("paddlex").setLevel(logging.ERROR)
        local = {}
        if self._models is not None:
            local = {
                "text_detection_model_name": DETECTION,
                "text_detection_model_dir": str(_existing(self._models / DETECTION)),
                "text_recognition_model_name": RECOGNITION,
                "text_recognition_model_dir": str(_existing(self._models / RECOGNITION)),
            }
        try:
            self._engine = PaddleOCR(
                engine="onnxruntime",
                device="cpu",
                cpu_threads=self._num_threads or os.cpu_count() or 1,
                use_doc_orientation_classify=False,
                use_doc_unwarping=False,
                use_textline_orientation=False,
                **local,
            )
        except Exception as error:  # PaddleX raises bare exceptions of many kinds
            raise ExpertError(
                f"PaddleOCR cannot load its models: {error}; without network give a folder made by "
                "experts.paddle_ocr.make_model_folder"
            ) from error

    def _describe(self, image: Image.Image) -> Reading:
        (page,) = self._engine.predict(as_bgr(image))
        corners = [polygon.tolist() for polygon in page["rec_polys"]]
        found = zip(corners, page["rec_texts"], page["rec_scores"], strict=True)
        return compose((Piece(*piece) for piece in found), self._min_confidence)


def make_model_folder(target: Path) -> Path:
    """Lay out the PP-OCRv6 models of the installed RapidOCR package for PaddleOCR; returns `target`.

    Per model a folder with `inference.onnx` and `inference.yml` (JSON, which is YAML too). The recogniser's
    characters are in its ONNX metadata. Raises `ExpertError` where RapidOCR or its models are missing.
    """
    try:
        package = Path(str(distribution("rapidocr").locate_file("rapidocr")))
    except PackageNotFoundError as error:
        raise ExpertError(
            "the models are taken from rapidocr; install llama-adapter-server[experts]"
        ) from error
    recogniser = _existing(package / "models" / _RAPIDOCR_FILES[RECOGNITION])
    configs = {DETECTION: _detection_config(), RECOGNITION: _recognition_config(_characters(recogniser))}
    for name, config in configs.items():
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_existing(package / "models" / _RAPIDOCR_FILES[name]), folder / "inference.onnx")
        (folder / "inference.yml").write_text(json.dumps(config, ensure_ascii=False, indent=1), "utf-8")
    return target


def _detection_config() -> dict[str, Any]:
    normalise = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "scale": "1./255.",
        "order": "hwc",
    }
    return {
        "Global": {"model_name": DETECTION},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"DetResizeForTest": {"resize_long": 960}},
                {"NormalizeImage": normalise},
                {"ToCHWImage": None},
                {"KeepKeys": {"keep_keys": ["image", "shape", "polys", "ignore_tags"]}},
            ]
        },
        "PostProcess": {
            "name": "DBPostProcess",
            "thresh": 0.3,
            "box_thresh": 0.6,
            "max_candidates": 1000,
            "unclip_ratio": 1.5,
        },
    }


def _recognition_config(characters: list[str]) -> dict[str, Any]:
    return {
        "Global": {"model_name": RECOGNITION},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"RecResizeImg": {"image_shape": [3, 48, 320]}},
                {"KeepKeys": {"keep_keys": ["image", "label_ctc", "label_gtc", "length", "valid_ratio"]}},
            ]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": characters},
    }


def _characters(recogniser: Path) -> list[str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(recogniser), providers=["CPUExecutionProvider"])
    # Not splitlines(): some of the characters are line separators to it.
    return [c for c in session.get_modelmeta().custom_metadata_map["character"].split("\n") if c]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ExpertError(f"{path}: missing; make the folder with experts.paddle_ocr.make_model_folder")
    return path


def _installed() -> str:
    try:
        return version("paddleocr")
    except PackageNotFoundError as error:
        raise ExpertError("needs paddleocr; install llama-adapter-server[paddle]") from error
