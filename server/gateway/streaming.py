"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError
from server.gateway.tasks import cancelled

PING = b": ping\n\n"  # a comment, which clients pass over
DONE = b"data: [DONE]\n\n"

_BEYOND_ASCII = re.compile("[^\0-\x7f]+")


def sse(data: dict[str, Any], event: str = "") -> bytes:
    """One event of one line of data. In ASCII, since many clients split lines at U+2028 and U+0085 too.

    Text by text, where json itself would let nobody else run until all of it is written.
    """
    head = b"event: %s\n" % event.encode("ascii") if event else b""
    text = to_json(data)  # in a fifth of json's time, but of itself in UTF-8
    if not text.isascii():
        text = _BEYOND_ASCII.sub(_escaped, text.decode()).encode("ascii")
    return b"%sdata: %s\n\n" % (head, text)


def _escaped(signs: re.Match[str]) -> str:
    return json.dumps(signs[0])[1:-1]


def error_event(error: ApiError) -> bytes:
    return sse(error.body())


class EventStream(Response):
    """Sends `chunks` as they come, unbuffered.

    The status is sent with the first chunk: an error before it is still an HTTP status, made by the
    `Errors` middleware. After it that middleware sends the last event, which `last_word` makes of the
    error: a deadline's is raised where this response has been cancelled. Whatever ends it closes `chunks`.

    Between chunks `PING` is sent after every `ping_seconds` of silence (0: never), since proxies close
    what they take for dead.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        ping_seconds: float,
        last_word: Callable[[ApiError], bytes] = error_event,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._ping_seconds = ping_seconds
        self._last_word = last_word

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            first = await anext(self._chunks)
            scope["last_word"] = self._last_word
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with _kept_alive(send, self._ping_seconds) as send_chunk:
                await send_chunk(first)
                async for chunk in self._chunks:
                    await send_chunk(chunk)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def _kept_alive(send: Send, seconds: float) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    """What sends a chunk. While the block runs another task looks at the clock; chunks start no timers."""
    last = time.monotonic()

    async def send_chunk(chunk: bytes) -> None:
        nonlocal last
        last = time.monotonic()
        await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def ping() -> None:
        while True:
            await asyncio.sleep(last + seconds - time.monotonic())
            if time.monotonic() >= last + seconds:
                await send_chunk(PING)

    pinging = [asyncio.create_task(ping())] if seconds else []
    try:
        yield send_chunk
    finally:
        await cancelled(pinging)
