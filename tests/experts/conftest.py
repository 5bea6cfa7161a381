"""Pictures that the experts' tests share, and an expert that is quick to ask."""

from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from experts.contract import Reading
from experts.local import LocalExpert

INVOICE_LINES = ["INVOICE 2041", "Espresso x2 $7.00", "Croissant $4.50", "Sales tax $36.70", "Total $48.20"]


def encoded(image: Image.Image, fmt: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, fmt)
    return buffer.getvalue()


def draw_invoice(size: int = 28) -> Image.Image:
    """Names on the left, amounts in a column far to the right, as receipts have them."""
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (size * 23, size * 14), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(INVOICE_LINES):
        name, _, amount = line.rpartition(" ") if "$" in line else (line, "", "")
        draw.text((size, size * (1 + 2.5 * i)), name, font=font, fill="black")
        draw.text((size * 17, size * (1 + 2.5 * i)), amount, font=font, fill="black")
    return image


@pytest.fixture
def invoice() -> Image.Image:
    return draw_invoice()


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def photo() -> Callable[[str], bytes]:
    """The file of one of scikit-image's sample photos."""
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return lambda name: (folder / name).read_bytes()


class SizeExpert(LocalExpert):
    """Says how large an image is; of a black one nothing."""

    def __init__(self, name: str = "size") -> None:
        super().__init__(name, "1")
        self.loaded = self.closed = False

    def _load(self) -> None:
        self.loaded = True

    def _describe(self, image: Image.Image) -> Reading:
        return Reading("" if image.getbbox() is None else f"{image.width}×{image.height}", 1.0)

    async def close(self) -> None:
        await super().close()
        self.closed = True


@pytest.fixture
def size_expert() -> SizeExpert:
    return SizeExpert()
