"""The worker's engine in this process, asked as the worker's HTTP routes ask it."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from PIL import Image

from server.settings import WorkerSettings

# Whatever imports torch waits until the threads are set, which torch reads once.
if TYPE_CHECKING:
    from server.worker.engine_api import Engine


class EngineClient:
    """Greedy requests that never end by themselves, of tokens and pictures that no other request has."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.engine = engine
        self._vocab_size = vocab_size
        self._random = random.Random(0)
        self._number = 0

    async def request(
        self, model: str, ids: tuple[int, ...], max_tokens: int, images: tuple[bytes, ...] = ()
    ) -> list[tuple[float, int]]:
        """When tokens came, and how many at once: more than one where a character was not whole before."""
        from server.worker.messages import Delta, GenerateRequest, SamplingParams, TokenPrompt

        self._number += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        request = GenerateRequest(f"r{self._number}", model, TokenPrompt(ids), params, images=images)
        return [
            (time.perf_counter(), len(event.token_ids))
            async for event in self.engine.generate(request)
            if isinstance(event, Delta)
        ]

    def fresh_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(1000, self._vocab_size) for _ in range(count))

    def fresh_image(self) -> bytes:
        picture = Image.new("RGB", (64, 64), tuple(self._random.randrange(256) for _ in range(3)))
        data = io.BytesIO()
        picture.save(data, "PNG")
        return data.getvalue()


@asynccontextmanager
async def start_engine(settings: WorkerSettings) -> AsyncGenerator[EngineClient]:
    """The native engine, started, and stopped at the end."""
    from models.pull import resolve_base
    from server.worker.build import build_engine

    config = resolve_base(settings.base, settings.cache_dir) / "config.json"
    engine = build_engine(settings)
    await engine.start()
    try:
        yield EngineClient(engine, json.loads(config.read_text())["vocab_size"])
    finally:
        await engine.stop()
