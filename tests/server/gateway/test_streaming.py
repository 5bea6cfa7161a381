"""What holds a stream open while there is nothing to tell."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator

import openai
import pytest

from server.gateway.streaming import PING
from server.worker.messages import Delta, Event, Finished, GenerateRequest, Started, Usage
from tests.server.gateway.scripted import Launch, ScriptedWorker, Stack

ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"input": "Hi"},
    "/v1/completions": {"prompt": "Hi"},
}


async def _hesitant(_: GenerateRequest) -> AsyncGenerator[Event, None]:
    yield Started(5)
    await asyncio.sleep(0.4)
    yield Delta("Hello", (100,))
    yield Delta(" world", (101,))
    await asyncio.sleep(0.4)
    yield Finished("stop", Usage(5, 2))


async def _raw(gateway: Stack, route: str) -> bytes:
    """The whole stream, in which there was no more of silence than its time allows."""
    body = {"model": "base", "stream": True, **ROUTES[route]}
    begun = time.monotonic()
    response = await gateway.http.post(route, json=body)
    assert response.status_code == 200
    every = gateway.app.state.gateway.settings.stream_ping_seconds
    assert response.content.count(PING) * every <= time.monotonic() - begun
    return response.content


@pytest.mark.parametrize("route", ROUTES)
async def test_a_comment_after_each_while_of_silence(
    launch: Launch, worker: ScriptedWorker, route: str
) -> None:
    worker.script = _hesitant
    raw = await _raw(await launch(worker, stream_ping_seconds=0.1), route)
    before, _, after = raw.partition(b"Hello")
    assert before.count(PING) >= 2
    assert after.count(PING) >= 2
    assert not any(b"data" in block and b": ping" in block for block in raw.split(b"\n\n"))  # between events
    quiet = await _raw(await launch(worker, stream_ping_seconds=0), route)
    assert PING not in quiet


async def test_what_flows_has_none_however_long_it_takes(launch: Launch, worker: ScriptedWorker) -> None:
    async def steady(_: GenerateRequest) -> AsyncGenerator[Event, None]:
        yield Started(5)
        for i in range(30):
            await asyncio.sleep(0.05)
            yield Delta("x", (i,))
        yield Finished("stop", Usage(5, 30))

    worker.script = steady
    gateway = await launch(worker, stream_ping_seconds=1.0)
    assert PING not in await _raw(gateway, "/v1/chat/completions")


async def test_openais_client_passes_them_over(launch: Launch, worker: ScriptedWorker) -> None:
    worker.script = _hesitant
    gateway = await launch(worker, stream_ping_seconds=0.05)
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        chunks = await client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        assert text == "Hello world"
        events = await client.responses.create(model="base", input="Hi", stream=True)
        kinds = [event.type async for event in events]
    assert kinds[-1] == "response.completed"


async def test_what_fails_amid_silence_still_has_the_last_word(
    launch: Launch, worker: ScriptedWorker
) -> None:
    async def silent(_: GenerateRequest) -> AsyncGenerator[Event, None]:
        yield Started(5)
        await asyncio.sleep(60)

    worker.script = silent
    raw = await _raw(
        await launch(worker, stream_ping_seconds=0.05, request_seconds=2), "/v1/chat/completions"
    )
    assert PING in raw
    last = raw.rstrip().split(b"\n\n")[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
