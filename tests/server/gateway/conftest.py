"""A gateway on a real socket before scripted workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import pytest_asyncio

from experts.contract import Expert
from server.gateway.app import create_app
from server.settings import GatewaySettings
from tests.server.gateway.scripted import Launch, ScriptedWorker, Stack, serving


@pytest_asyncio.fixture
async def launch() -> AsyncIterator[Launch]:
    """`await launch(worker, …, experts={}, **settings)` starts workers and a gateway before them."""
    async with AsyncExitStack() as stack:

        async def start(
            *workers: ScriptedWorker,
            experts: dict[str, Expert] | None = None,
            drain: Any = None,
            fetcher: Any = None,
            **settings: Any,
        ) -> Stack:
            urls = [await stack.enter_async_context(serving(worker.app)) for worker in workers]
            settings.setdefault("worker_urls", tuple(urls))
            settings.setdefault("worker_poll_seconds", 0.1)
            app = create_app(GatewaySettings(**settings), experts or {}, drain, fetcher)
            url = await stack.enter_async_context(serving(app))
            http = httpx.AsyncClient(base_url=url, timeout=20, trust_env=False)
            await stack.enter_async_context(http)
            return Stack(url, app, http)

        yield start


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest_asyncio.fixture
async def gateway(launch: Launch, worker: ScriptedWorker) -> Stack:
    """One worker, no experts, default settings."""
    return await launch(worker)
