"""RapidOCR with its packaged models on pictures whose text is known."""

import asyncio
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from experts.contract import BadImage, Expert
from experts.ocr import OcrExpert, as_bgr

Encode = Callable[..., bytes]
INVOICE_TEXT = "INVOICE 2041\nEspresso x2 $7.00\nCroissant $4.50\nSales tax $36.70\nTotal $48.20"


@pytest.fixture(scope="module")
def ocr() -> Iterator[OcrExpert]:
    expert = OcrExpert(num_threads=1)
    asyncio.run(expert.load())
    yield expert
    asyncio.run(expert.close())


async def test_an_invoice_is_read_exactly(ocr: OcrExpert, invoice: Image.Image, encode: Encode) -> None:
    assert isinstance(ocr, Expert)
    for fmt in ("PNG", "JPEG"):
        reading = await ocr.read(encode(invoice, fmt))
        assert reading.text == INVOICE_TEXT
        assert reading.confidence is not None
        assert 0.95 < reading.confidence <= 1


@pytest.mark.parametrize("angle", [-3, 4])
async def test_a_photographed_page_may_be_askew(
    ocr: OcrExpert, invoice: Image.Image, encode: Encode, angle: float
) -> None:
    askew = invoice.rotate(angle, expand=True, fillcolor="white", resample=Image.Resampling.BICUBIC)
    assert (await ocr.read(encode(askew.filter(ImageFilter.GaussianBlur(0.6))))).text == INVOICE_TEXT


async def test_a_page_on_its_right_side(ocr: OcrExpert, invoice: Image.Image, encode: Encode) -> None:
    reading = await ocr.read(encode(invoice.transpose(Image.Transpose.ROTATE_270)))
    assert reading.text.split("\n") == INVOICE_TEXT.split("\n")


async def test_any_threshold_has_its_effect(
    ocr: OcrExpert, invoice: Image.Image, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one below RapidOCR's own, which is 0.5."""
    blurred = invoice.resize((invoice.width // 8, invoice.height // 8)).resize(invoice.size)
    lengths = []
    for threshold in (0.1, 0.5, 0.7):
        monkeypatch.setattr(ocr, "_min_confidence", threshold)
        lengths.append(len((await ocr.read(encode(blurred))).text))
    assert lengths[0] > lengths[1] > lengths[2] > 0


async def test_white_on_dark(ocr: OcrExpert, invoice: Image.Image, encode: Encode) -> None:
    assert (await ocr.read(encode(ImageOps.invert(invoice)))).text == INVOICE_TEXT


@pytest.mark.parametrize("size", [(1, 1), (300, 200), (1, 3000), (3000, 1), (40, 20_000), (20_000, 40)])
async def test_pictures_without_text_are_empty_and_quick(
    ocr: OcrExpert, encode: Encode, size: tuple[int, int]
) -> None:
    start = time.perf_counter()
    assert (await ocr.read(encode(Image.new("RGB", size, "white")))).text == ""
    assert time.perf_counter() - start < 20  # about 0.5; minutes without the bounds of `as_bgr`


async def test_noise_reads_as_nothing(ocr: OcrExpert, encode: Encode) -> None:
    assert (await ocr.read(encode(Image.effect_noise((200, 200), 90)))).text == ""


async def test_what_is_no_image_is_refused(ocr: OcrExpert, invoice: Image.Image, encode: Encode) -> None:
    for data in (b"", b"<html>", encode(invoice)[:2000]):
        with pytest.raises(BadImage):
            await ocr.read(data)


async def test_the_loop_runs_on_while_it_reads(ocr: OcrExpert, invoice: Image.Image, encode: Encode) -> None:
    reading, ticks = asyncio.ensure_future(ocr.read(encode(invoice))), 0
    while not reading.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert reading.result().text == INVOICE_TEXT
    assert ticks >= 5


async def test_nothing_is_logged_or_printed(
    ocr: OcrExpert, encode: Encode, capfd: pytest.CaptureFixture[str]
) -> None:
    await ocr.read(encode(Image.new("RGB", (200, 200), "white")))
    assert capfd.readouterr() == ("", "")


async def test_the_version_tells_engine_and_threshold() -> None:
    assert OcrExpert().version != OcrExpert(min_confidence=0.9).version
    assert OcrExpert().version.startswith("rapidocr-3.")


async def test_the_detectors_input_is_bounded() -> None:
    assert as_bgr(Image.new("RGB", (4000, 1000))).shape == (500, 2000, 3)
    assert as_bgr(Image.new("RGB", (1, 100_000))).shape == (2000, 64, 3)
    red = as_bgr(Image.new("RGB", (80, 64), "red"))
    assert np.array_equal(red[0, 0], [0, 0, 255])
