"""The worker's event loop goes on while large requests are made ready, which threads of their own do."""

from __future__ import annotations

import asyncio
import random
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image
from tiny_base import write_adapter, write_tiny_base

from server.serving import Drain, bind, serve_app
from server.settings import WorkerSettings
from server.worker.app import create_app
from server.worker.build import build_engine
from server.worker.messages import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
    generate_body,
)

pytestmark = pytest.mark.timeout(180)

POSITIONS = 2**17  # a megabyte of text may fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_base(folder / "tiny", positions=POSITIONS)
    write_adapter(folder / "sight", "sight")
    return folder


@asynccontextmanager
async def worker(folder: Path, socket: Path) -> AsyncIterator[None]:
    settings = WorkerSettings(
        base=str(folder / "tiny"), dtype="float32", kv_cache_mib=64, adapters=(f"sight={folder / 'sight'}",)
    )
    drain = Drain()
    app = create_app(build_engine(settings), settings, drain)
    serving = asyncio.create_task(serve_app(app, bind("", 0, socket), drain, 5.0))
    yield
    drain.ask()
    await serving


def post(socket: Path, body: bytes) -> httpx.Response:
    transport = httpx.HTTPTransport(uds=str(socket))
    with httpx.Client(transport=transport, base_url="http://worker", timeout=120) as client:
        return client.post("/generate", content=body)


@dataclass
class Watched:
    """How the event loop fared while a thread asked for something."""

    answer: httpx.Response
    seconds: float
    longest_gap: float  # between two of its turns
    longest_stretch: float  # of its own work, in its thread's seconds, which a busy machine hardly changes


async def watched(ask: Callable[[], httpx.Response]) -> Watched:
    asking = asyncio.create_task(asyncio.to_thread(ask))
    gap = stretch = 0.0
    begun = last = time.monotonic()
    while not asking.done():
        own = time.thread_time()
        await asyncio.sleep(0.002)
        stretch = max(stretch, time.thread_time() - own)
        gap, last = max(gap, time.monotonic() - last), time.monotonic()
    return Watched(asking.result(), last - begun, gap, stretch)


def noise(side: int) -> bytes:
    data = BytesIO()
    pixels = random.Random(0).randbytes(side * side * 3)
    Image.frombytes("RGB", (side, side), pixels).save(data, "PNG", compress_level=1)
    return data.getvalue()


async def test_a_long_text(folder: Path, tmp_path: Path) -> None:
    """It takes a second to see that these are too many tokens; nobody else waits for that."""
    words = random.Random(0).choices(["the", "quick", "brown", "fox", "naïve", "4711", "\n\n"], k=200_000)
    body = b"".join(generate_body(GenerateRequest("r", "tiny", TextPrompt(" ".join(words)))))
    async with worker(folder, tmp_path / "w.sock"):
        seen = [await watched(lambda: post(tmp_path / "w.sock", body)) for _ in range(3)]
    for one in seen:
        assert one.answer.json()["error"]["code"] == "context_length_exceeded"
        assert "prompt tokens" in one.answer.json()["error"]["message"]  # they were counted
    assert min(one.longest_gap / one.seconds for one in seen) < 1 / 4  # a busy machine makes gaps, too


async def test_a_text_that_is_far_too_long_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    """To count its tokens would take a minute of a thread."""
    for prompt in (TextPrompt("a b " * 4_000_000), ChatPrompt((ChatMessage("user", "a b " * 4_000_000),))):
        body = b"".join(generate_body(GenerateRequest("r", "tiny", prompt)))
        async with worker(folder, tmp_path / "w.sock"):
            begun = time.process_time()
            answer = await asyncio.to_thread(post, tmp_path / "w.sock", body)
            assert time.process_time() - begun < 2
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "characters cannot fit" in answer.json()["error"]["message"]


async def test_a_large_image(folder: Path, tmp_path: Path) -> None:
    image = noise(2200)
    assert len(image) > 14_000_000
    prompt = ChatPrompt((ChatMessage("user", "hi"),))
    request = GenerateRequest("r", "sight", prompt, SamplingParams(max_tokens=1), images=(image,))
    body = b"".join(generate_body(request))
    async with worker(folder, tmp_path / "w.sock"):
        seen = [await watched(lambda: post(tmp_path / "w.sock", body)) for _ in range(3)]
    assert [one.answer.status_code for one in seen] == [200] * 3
    begun = time.thread_time()
    b64decode(b64encode(image))
    cost = time.thread_time() - begun
    assert min(one.longest_stretch for one in seen) < cost / 2  # nor does it travel as base64
