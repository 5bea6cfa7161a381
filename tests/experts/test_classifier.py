"""The classifier on real photos."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from experts.classifier import ClassifierExpert
from experts.contract import BadImage

Photo = Callable[[str], bytes]


@pytest.fixture(scope="module")
def classifier() -> Iterator[ClassifierExpert]:
    expert = ClassifierExpert()
    asyncio.run(expert.load())
    yield expert
    asyncio.run(expert.close())


@pytest.mark.parametrize(
    ("file", "name", "least"), [("coffee.png", "espresso", 0.9), ("camera.png", "tripod", 0.8)]
)
async def test_it_names_what_it_sees(
    classifier: ClassifierExpert, photo: Photo, file: str, name: str, least: float
) -> None:
    reading = await classifier.read(photo(file))
    assert reading.confidence is not None
    assert reading.confidence > least
    assert reading.text == f"{name} ({reading.confidence:.0%})"


async def test_it_is_silent_when_unsure(
    classifier: ClassifierExpert, photo: Photo, encode: Callable[..., bytes]
) -> None:
    for data in (photo("astronaut.png"), encode(Image.new("RGB", (224, 224), "grey"))):
        reading = await classifier.read(data)
        assert reading.text == ""
        assert reading.confidence is not None
        assert reading.confidence < 0.3


async def test_the_threshold_is_the_callers(photo: Photo) -> None:
    expert = ClassifierExpert(min_confidence=0.999)
    await expert.load()
    try:
        assert (await expert.read(photo("coffee.png"))).text == ""
    finally:
        await expert.close()
    assert expert.version != ClassifierExpert().version


async def test_what_is_no_image_is_refused(classifier: ClassifierExpert) -> None:
    with pytest.raises(BadImage, match="not a PNG, JPEG, WebP or GIF"):
        await classifier.read(b"hello")
