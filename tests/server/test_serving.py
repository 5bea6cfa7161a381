"""What runs an app: here, what becomes of failures that are in no request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.serving import Drain, bind, serve_app


async def app(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def test_a_late_result_is_no_failure_and_anything_else_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise asyncio.InvalidStateError("one of ours")

    drain = Drain()
    serving = asyncio.create_task(serve_app(app, bind("", 0, tmp_path / "s.sock"), drain, 1.0))
    await asyncio.sleep(0.1)
    loop = asyncio.get_running_loop()
    wait: asyncio.Future[None] = loop.create_future()
    wait.cancel()
    loop.call_soon(wait.set_result, None)
    await asyncio.sleep(0)
    assert not caplog.records
    loop.call_soon(fail)
    await asyncio.sleep(0)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    drain.ask()
    await serving
