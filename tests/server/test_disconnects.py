"""A client that leaves frees its blocks within one step; gateway, worker and engine are real."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_base import write_tiny_base

from server.gateway.app import create_app
from server.settings import GatewaySettings, WorkerSettings
from server.worker.app import create_app as create_worker_app
from server.worker.build import build_engine
from server.worker.engine import NativeEngine
from tests.server.gateway.scripted import serving, until

STEP_SECONDS = 0.15  # a step of a large base; the tiny one's would be over before any message arrives


@dataclass
class Stack:
    engine: NativeEngine
    http: httpx.AsyncClient

    @asynccontextmanager
    async def stream(self, text: str, **fields: Any) -> AsyncIterator[httpx.Response]:
        """A stream whose first text has come."""
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": True,
        }
        async with self.http.stream("POST", "/v1/chat/completions", json=body | fields) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()  # kept: httpx closes the stream of an iterator that is dropped
            async for line in lines:
                if '"content":' in line and '"content":""' not in line:
                    break
            yield response


@pytest.fixture
async def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stack]:
    write_tiny_base(tmp_path / "tiny")
    settings = WorkerSettings(base=str(tmp_path / "tiny"), dtype="float32", kv_cache_mib=1)
    engine = build_engine(settings)
    run = engine._step_loop.runner.run

    def slowly(*arguments: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return run(*arguments)

    monkeypatch.setattr(engine._step_loop.runner, "run", slowly)
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(serving(create_worker_app(engine, settings)))
        app = create_app(GatewaySettings(worker_urls=(worker,)), {})
        url = await stack.enter_async_context(serving(app))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30, trust_env=False))
        yield Stack(engine, http)
        engine._step_loop.check_integrity()


async def test_a_stream_that_is_left_frees_its_blocks_within_one_step(stack: Stack) -> None:
    """Counted beside a stream that goes on, so that there are steps to count."""
    stats = stack.engine.stats
    async with stack.stream("stay"):
        alone = stats().kv_blocks_used
        async with stack.stream("leave " * 40):
            assert stats().running == 2
            assert stats().kv_blocks_used > alone + 5
            left_at = stats().steps
        await until(lambda: stats().running == 1)
        # The step that ran when the client left, whose blocks are still written to, and none after it.
        assert stats().steps - left_at <= 1
        assert stats().kv_blocks_used <= alone + 2  # the other has grown
        await until(lambda: stats().steps >= left_at + 4)
        assert stats().running == 1
    await until(lambda: stats().kv_blocks_used == 0)


async def test_a_waiting_client_that_leaves_costs_no_step(stack: Stack) -> None:
    """An answer in one piece: nothing is sent until the end, and still the client's leaving is seen."""
    stats = stack.engine.stats
    body = {"model": "tiny", "prompt": "tell " * 40, "max_tokens": 200, "ignore_eos": True}
    asking = asyncio.create_task(stack.http.post("/v1/completions", json=body))
    await until(lambda: stats().running == 1 and stats().steps > 2)
    left_at = stats().steps
    asking.cancel()
    await until(lambda: stats().running == 0)
    assert stats().steps - left_at <= 1
    assert stats().kv_blocks_used == 0
    steps = stats().steps
    await asyncio.sleep(3 * STEP_SECONDS)
    assert stats().steps == steps  # it rests


async def test_every_choice_of_a_request_ends_with_its_client(stack: Stack) -> None:
    stats = stack.engine.stats
    async with stack.stream("choose", n=4):
        await until(lambda: stats().running == 4)
        left_at = stats().steps
    await until(lambda: stats().running == 0)
    assert stats().steps - left_at <= 1
    assert stats().kv_blocks_used == 0
