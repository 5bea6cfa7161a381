import pytest

from experts.caption import PROMPT, CaptionExpert, one_sentence
from experts.contract import Expert, ExpertError, Reading


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("A cat on a mat.", "A cat on a mat."),
        ("  A cat\ton a   mat. It sleeps. ", "A cat on a mat."),
        ("\n\nA dog!\nA second line", "A dog!"),
        ('"A red ball"', "A red ball"),
        ('Caption: "A red ball."', "A red ball."),
        ("The caption of this image: two men", "two men"),
        ("a 2.5 litre bottle. Full", "a 2.5 litre bottle."),
        ("caption competition winner", "caption competition winner"),
        ("", ""),
        (' \n "" \n ', ""),
    ],
)
def test_one_sentence(answer: str, caption: str) -> None:
    assert one_sentence(answer) == caption


async def test_it_asks_with_the_adapters_prompt() -> None:
    asked = []

    async def generate(image: bytes, prompt: str) -> Reading:
        asked.append((image, prompt))
        return Reading("A castle on a hill. The sky is blue.", 0.7)

    expert = CaptionExpert(generate, version=lambda: "caption-7")
    assert isinstance(expert, Expert)
    await expert.load()
    assert await expert.read(b"bytes") == Reading("A castle on a hill.", 0.7)
    await expert.close()
    assert asked == [(b"bytes", PROMPT)]
    assert (expert.name, expert.version) == ("caption", "caption-7")


@pytest.mark.parametrize(
    ("confidence", "text"), [(0.5, "A castle"), (0.51, "A castle"), (0.49, ""), (None, "A castle")]
)
async def test_an_unsure_adapter_says_nothing(confidence: float | None, text: str) -> None:
    async def generate(image: bytes, prompt: str) -> Reading:
        return Reading("A castle", confidence)

    expert = CaptionExpert(generate, lambda: "1", min_confidence=0.5)
    assert await expert.read(b"") == Reading(text, confidence)


@pytest.mark.parametrize("failure", [ConnectionError("gone"), ExpertError("the adapter is not loaded")])
async def test_its_failures_are_an_experts(failure: Exception) -> None:
    async def generate(image: bytes, prompt: str) -> Reading:
        raise failure

    with pytest.raises(ExpertError, match=str(failure)):
        await CaptionExpert(generate, lambda: "1").read(b"")
