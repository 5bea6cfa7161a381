"""Images of the engine on vLLM, without vLLM: who waits for them, and who does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from models.vllm_plugin.carriers import EVERYTHING
from server.worker import vllm_engine
from server.worker.messages import Event, Finished, SamplingParams, Scheduled
from server.worker.request import Prepared
from server.worker.sight import ImageInput, LoadedAdapter
from server.worker.vllm_engine import VllmEngine

KEY = ("sees", 1)


class NoWords:
    """A tokenizer for answers of no tokens."""

    eos_ids = frozenset({0})
    strips_leading_space = False


class EmptyAnswers:
    """In vLLM's place: every request ends at once."""

    healthy = True

    async def generate(self, *_: Any) -> AsyncGenerator[Any, None]:
        yield type(
            "Output",
            (),
            {"queued_seconds": 0.0, "prompt_steps": None, "tokens": (), "steps": None, "cached_tokens": 0}
            | {"finish_reason": "length"},
        )

    def stop(self) -> None: ...


class Eye:
    """In the encoder's place: it may be held."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.seen: list[float] = []

    def __call__(self, adapter: Any, encoder: Any, pixels: Tensor) -> Tensor:
        assert self.open.wait(10)
        self.seen.append(pixels.item())
        return pixels


@pytest.fixture
def eye(monkeypatch: pytest.MonkeyPatch) -> Iterator[Eye]:
    eye = Eye()
    monkeypatch.setattr(vllm_engine, "visual_rows", eye)
    yield eye
    eye.open.set()


async def engine() -> VllmEngine:
    vllm, tokenizer, none = EmptyAnswers(), NoWords(), None
    made = VllmEngine(vllm, none, tokenizer, none, [], room=EVERYTHING, max_requests=8)  # type: ignore[arg-type]
    made._loras[KEY] = None
    return made


def asks(image: int) -> Prepared:
    adapter: Any = LoadedAdapter(KEY, object(), object())  # type: ignore[arg-type]
    pixels = ImageInput(str(image), torch.tensor(float(image)))
    return Prepared("r", [1], SamplingParams(), 0, (), adapter, pixels)


async def events(made: VllmEngine, prepared: Prepared, deadline: float | None = None) -> list[Event]:
    return [event async for event in made._events(prepared, deadline)]


async def test_others_texts_are_read_while_images_are_encoded(eye: Eye) -> None:
    made = await engine()
    waiting = [asyncio.create_task(events(made, asks(i))) for i in range(4)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        assert await made._prepare(lambda: "read") == "read"
    eye.open.set()
    for found in await asyncio.gather(*waiting):
        assert [type(event) for event in found] == [Scheduled, Finished]
    await made.stop()


async def test_the_deadline_holds_while_an_image_waits(eye: Eye) -> None:
    made = await engine()
    first = asyncio.create_task(events(made, asks(0)))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(events(made, asks(1), asyncio.get_running_loop().time() + 0.1))
    await asyncio.wait({second}, timeout=5)
    assert second.done()
    with pytest.raises(TimeoutError):
        await second
    eye.open.set()
    await first
    assert eye.seen == [0.0]  # whose request is gone is encoded for nobody
    await made.stop()


async def test_an_image_that_comes_twice_at_once_is_encoded_once(eye: Eye) -> None:
    made = await engine()
    waiting = [asyncio.create_task(events(made, asks(7))) for _ in range(3)]
    await asyncio.sleep(0.05)
    eye.open.set()
    await asyncio.gather(*waiting)
    await events(made, asks(7))
    assert eye.seen == [7.0]
    await made.stop()
