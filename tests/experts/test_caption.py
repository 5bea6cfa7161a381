import pytest

from experts.caption import PROMPT, CaptionExpert, one_sentence
from experts.contract import Expert, ExpertError


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

    async def generate(image: bytes, prompt: str) -> str:
        asked.append((image, prompt))
        return "A castle on a hill. The sky is blue."

    expert = CaptionExpert(generate, version=lambda: "caption-7")
    assert isinstance(expert, Expert)
    await expert.load()
    assert (await expert.read(b"bytes")).text == "A castle on a hill."
    await expert.close()
    assert asked == [(b"bytes", PROMPT)]
    assert (expert.name, expert.version) == ("caption", "caption-7")


@pytest.mark.parametrize("failure", [ConnectionError("gone"), ExpertError("the adapter is not loaded")])
async def test_its_failures_are_an_experts(failure: Exception) -> None:
    async def generate(image: bytes, prompt: str) -> str:
        raise failure

    with pytest.raises(ExpertError, match=str(failure)):
        await CaptionExpert(generate, lambda: "1").read(b"")
