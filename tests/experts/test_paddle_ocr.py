"""PaddleOCR's own API on RapidOCR's models. Its OpenCV excludes RapidOCR's: run it in a place of its own.

pip install paddleocr onnxruntime pytest pytest-asyncio pytest-timeout && pip install --no-deps rapidocr
pytest --confcutdir tests/experts -o filterwarnings=default tests/experts/test_paddle_ocr.py
"""

import asyncio
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from experts.contract import BadImage, ExpertError
from experts.paddle_ocr import DETECTION, RECOGNITION, PaddleOcrExpert, make_model_folder

needs_paddle = pytest.mark.skipif(find_spec("paddleocr") is None, reason="the paddle extra is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("paddle"))


def test_the_folder_holds_both_models_and_every_character(models: Path) -> None:
    recogniser = json.loads((models / RECOGNITION / "inference.yml").read_text("utf-8"))
    characters = recogniser["PostProcess"]["character_dict"]
    assert len(characters) == 18708
    assert {"a", "Z", "$", "€", "0"} <= set(characters)
    for name in (DETECTION, RECOGNITION):
        assert (models / name / "inference.onnx").stat().st_size > 1_000_000
        config = json.loads((models / name / "inference.yml").read_text("utf-8"))
        assert config["Global"]["model_name"] == name


@pytest.mark.paddle
@needs_paddle
class TestWithPaddleOcr:
    def test_an_invoice_is_read_exactly(
        self, models: Path, invoice: Image.Image, encode: Callable[..., bytes]
    ) -> None:
        async def read() -> str:
            expert = PaddleOcrExpert(models, num_threads=2)
            await expert.load()
            try:
                reading = await expert.read(encode(invoice))
                assert (await expert.read(encode(Image.new("RGB", (1, 3000), "white")))).text == ""
                with pytest.raises(BadImage):
                    await expert.read(b"")
            finally:
                await expert.close()
            assert reading.confidence is not None
            assert reading.confidence > 0.9
            return reading.text

        expected = "INVOICE 2041\nEspresso x2 $7.00\nCroissant $4.50\nSales tax $36.70\nTotal $48.20"
        assert asyncio.run(read()) == expected

    def test_an_empty_folder_says_how_to_fill_it(self, tmp_path: Path) -> None:
        expert = PaddleOcrExpert(tmp_path)
        with pytest.raises(ExpertError, match=r"missing; make the folder with .*make_model_folder"):
            asyncio.run(expert.load())


@pytest.mark.skipif(find_spec("paddleocr") is not None, reason="it is installed")
def test_without_the_package_the_error_names_the_extra() -> None:
    with pytest.raises(ExpertError, match=r"install llama-adapter-server\[paddle\]"):
        PaddleOcrExpert()
