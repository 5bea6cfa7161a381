"""What the caption adapter is asked, and what becomes of its answer, its failures and its versions."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

import pytest

from experts.contract import Busy, ExpertError, Reading
from server.captioning import caption_generator, caption_version
from server.errors import RateLimited, Unavailable, model_not_found
from server.worker.messages import (
    ChatMessage,
    ChatPrompt,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    ModelInfo,
    Started,
    TokenLogprob,
    Usage,
)

INFO = ModelInfo("caption", "adapter", "caption", "base", 1_700_000_000, 2048, reads_images=True)


class Worker:
    """Tells the same to whoever asks; an error is raised in its place."""

    def __init__(self, *events: Event | Exception) -> None:
        self.events = events
        self.requests: list[GenerateRequest] = []
        self.closed = False

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        try:
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed = True


def spoken(text: str, *logprobs: float) -> Delta:
    return Delta(text, (7,) * len(logprobs), tuple(TokenLogprob(7, "x", value) for value in logprobs))


def model_of(info: ModelInfo | Exception) -> Callable[[str], ModelInfo]:
    def find(id: str) -> ModelInfo:
        assert id == "caption"
        if isinstance(info, Exception):
            raise info
        return info

    return find


async def test_a_caption_is_greedy_and_as_sure_as_its_tokens_are() -> None:
    deltas = spoken("a red", -0.1, -0.6), spoken(" car", -0.2)
    worker = Worker(Started(9), *deltas, Finished("stop", Usage(9, 3)))
    reading = await caption_generator(model_of(INFO), worker.generate)(b"picture", "What is it?")
    assert reading == Reading("a red car", pytest.approx(math.exp(-0.3)))
    [request] = worker.requests
    assert (request.model, request.images) == ("caption", (b"picture",))
    assert request.prompt == ChatPrompt((ChatMessage("user", "What is it?"),))
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, 64)
    assert request.sampling.logprobs == 0  # the tokens' own, for the confidence, and no others
    assert worker.closed


async def test_a_caption_of_nothing_is_as_sure_as_nothing() -> None:
    worker = Worker(Started(9), Finished("stop", Usage(9, 0)))
    assert await caption_generator(model_of(INFO), worker.generate)(b"", "") == Reading("", None)


@pytest.mark.parametrize(
    ("info", "events", "why"),
    [
        (replace(INFO, reads_images=False), (), "'caption' reads no images; serve one that does"),
        (model_not_found("caption"), (), "the worker gave no caption: .*caption"),
        (INFO, (Unavailable("all are away"),), "the worker gave no caption: all are away"),
        (INFO, (Started(9), spoken("a", -0.1), Unavailable("it is gone")), "no caption: it is gone"),
    ],
)
async def test_what_goes_wrong_is_an_experts_failure(
    info: ModelInfo | Exception, events: Sequence[Event | Exception], why: str
) -> None:
    worker = Worker(*events)
    with pytest.raises(ExpertError, match=why):
        await caption_generator(model_of(info), worker.generate)(b"", "")
    assert len(worker.requests) == bool(events)


async def test_a_full_queue_is_no_failure() -> None:
    worker = Worker(RateLimited("too many wait"))
    with pytest.raises(Busy, match="the worker gave no caption: too many wait"):
        await caption_generator(model_of(INFO), worker.generate)(b"", "")


def test_any_load_of_the_adapter_is_another_version() -> None:
    """Of a worker that was started again as well, whose versions count from one anew."""
    first, second = INFO, replace(INFO, version=2)
    versions = [
        caption_version(lambda _, held=held: held)()  # type: ignore[misc]
        for held in ([], [first], [second], [replace(first, created=1_700_000_001)], [first, second])
    ]
    assert len(set(versions)) == len(versions)
    assert caption_version(lambda _: [second, first])() == versions[-1]
