"""A sentence on what an image shows, by a LLaMA-Adapter V1 caption adapter on the serving engine."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from experts.contract import ExpertError, Reading

PROMPT = "Generate caption of this image :"  # as the V1 caption adapter was asked

# What the adapter answers to (image, prompt): its text, and how sure it was of a token on average.
Generate = Callable[[bytes, str], Awaitable[Reading]]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_LEAD = re.compile(r"^(?:the )?(?:image )?caption(?: of (?:this|the) image)?\s*:\s*", re.IGNORECASE)
_QUOTES = "\"'“”‘’` "


class CaptionExpert:
    """An `Expert` that asks `generate(image, prompt)` and keeps the first sentence of its answer.

    Of an image unlike those it was trained on an adapter says something all the same, but is not sure of
    it: below `min_confidence` nothing is said. `version()` has to change with the adapter behind `generate`.
    """

    name = "caption"

    def __init__(
        self,
        generate: Generate,
        version: Callable[[], str],
        min_confidence: float = 0.0,
        prompt: str = PROMPT,
    ) -> None:
        self._generate = generate
        self._version = version
        self._min_confidence = min_confidence
        self._prompt = prompt

    @property
    def version(self) -> str:
        return self._version()

    async def load(self) -> None:
        """Nothing to load: the engine holds the adapter."""

    async def refresh(self) -> None:
        """Nothing to ask: `version` is asked each time."""

    async def read(self, image: bytes) -> Reading:
        try:
            answer = await self._generate(image, self._prompt)
        except ExpertError:
            raise
        except Exception as error:  # whatever the engine's client raises
            raise ExpertError(f"the caption adapter gave no answer: {error}") from error
        sure = answer.confidence is None or answer.confidence >= self._min_confidence
        return Reading(one_sentence(answer.text) if sure else "", answer.confidence)

    async def close(self) -> None:
        """Nothing to close."""


def one_sentence(answer: str) -> str:
    """The first sentence of a model's first non-empty line, without quotes and a leading `Caption:`."""
    lines = [line for line in map(_plain, answer.splitlines()) if line]
    return _SENTENCE_END.split(lines[0], maxsplit=1)[0].strip(_QUOTES) if lines else ""


def _plain(line: str) -> str:
    line = " ".join(line.split()).strip(_QUOTES)
    return _LEAD.sub("", line).strip(_QUOTES)
