"""A client that leaves frees its blocks within one step; gateway, worker and engine are real."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
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

STEP_SECONDS = 0.05  # else all answers would be over before any message arrives


class Steps:
    """Counts the sequences of each step; holds one, however long a message takes on a busy machine."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._free, self._begun = threading.Event(), threading.Event()
        self._free.set()
        self.sizes: list[int] = []

    def __call__(self, items: Any, *rest: Any) -> Any:
        time.sleep(STEP_SECONDS)
        self.sizes.append(len(items))
        if not self._free.is_set():
            self._begun.set()
        assert self._free.wait(30)
        return self._run(items, *rest)

    async def hold(self) -> None:
        """Returns once a step is under way that will not end."""
        self._free.clear()
        assert await asyncio.to_thread(self._begun.wait, 30)

    def release(self) -> None:
        self._begun.clear()
        self._free.set()


@dataclass
class Stack:
    engine: NativeEngine
    http: httpx.AsyncClient
    steps: Steps

    async def told_to_abort(self, number: int = 1) -> None:
        """So many requests, in the midst of a step."""
        await until(lambda: self.engine._inbox.qsize() == number)

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
    steps = Steps(engine._step_loop.runner.run)
    monkeypatch.setattr(engine._step_loop.runner, "run", steps)
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(serving(create_worker_app(engine, settings)))
        app = create_app(GatewaySettings(worker_urls=(worker,)), {})
        url = await stack.enter_async_context(serving(app))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30, trust_env=False))
        yield Stack(engine, http, steps)
        engine._step_loop.check_integrity()


async def test_a_stream_that_is_left_frees_its_blocks_within_one_step(stack: Stack) -> None:
    """Counted beside a stream that goes on, so that there are steps to count."""
    stats, steps = stack.engine.stats, stack.steps
    async with stack.stream("stay"):
        alone = stats().kv_blocks_used
        async with stack.stream("leave " * 40):
            assert stats().running == 2
            assert stats().kv_blocks_used > alone + 5
            await steps.hold()
            held = len(steps.sizes)
        await stack.told_to_abort()
        steps.release()
        await until(lambda: len(steps.sizes) >= held + 4)
        # The step that ran when the client left, whose blocks are still written to, and none after it.
        assert steps.sizes[held - 1] == 2
        assert set(steps.sizes[held:]) == {1}
        assert stats().running == 1
        assert stats().kv_blocks_used <= alone + 5  # the other has grown
    await until(lambda: stats().kv_blocks_used == 0)


async def test_a_waiting_client_that_leaves_costs_no_step(stack: Stack) -> None:
    """An answer in one piece: nothing is sent until the end, and still the client's leaving is seen."""
    stats, steps = stack.engine.stats, stack.steps
    body = {"model": "tiny", "prompt": "tell " * 40, "max_tokens": 200, "ignore_eos": True}
    asking = asyncio.create_task(stack.http.post("/v1/completions", json=body))
    await until(lambda: stats().running == 1 and stats().steps > 2)
    await steps.hold()
    held = len(steps.sizes)
    asking.cancel()
    await stack.told_to_abort()
    steps.release()
    await until(lambda: stats().running == 0)
    assert stats().kv_blocks_used == 0
    await asyncio.sleep(3 * STEP_SECONDS)
    assert len(steps.sizes) == held  # it rests


async def test_every_choice_of_a_request_ends_with_its_client(stack: Stack) -> None:
    stats, steps = stack.engine.stats, stack.steps
    async with stack.stream("choose", n=4):
        await until(lambda: stats().running == 4)
        await steps.hold()
        held = len(steps.sizes)
    await stack.told_to_abort(4)
    steps.release()
    await until(lambda: stats().running == 0)
    assert len(steps.sizes) == held
    assert stats().kv_blocks_used == 0
