"""What runs an app: here, what becomes of failures that are in no request."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from server import serving
from server.serving import Drain, bind, serve_app
from tests.server.gateway.scripted import until


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
    running = asyncio.create_task(serve_app(app, bind("", 0, tmp_path / "s.sock"), drain, 1.0))
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
    await running


@pytest.mark.skipif(sys.platform != "linux", reason="other systems wait for as long as the client answers")
async def test_a_client_that_takes_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its system answers for it as long as it lives, and says that there is no room."""
    monkeypatch.setattr(serving, "_UNREAD_SECONDS", 1)
    begun = left = False

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        nonlocal begun, left
        if scope["type"] == "lifespan":
            return await app(scope, receive, send)
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
            begun = True
        left = True

    drain = Drain()
    listening = bind("127.0.0.1", 0)
    address = listening.getsockname()
    running = asyncio.create_task(serve_app(endless, listening, drain, 1.0))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, address)
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        await until(lambda: begun)
        assert not left
        await until(lambda: left, seconds=10)
    drain.ask()
    await running
