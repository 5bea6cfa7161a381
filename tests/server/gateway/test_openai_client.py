"""The stock `openai` client, against a gateway on a real socket."""

from __future__ import annotations

import asyncio

import openai
import pytest

from server.errors import RateLimited
from server.worker.messages import Delta, Started
from tests.server.gateway.scripted import Died, Launch, ScriptedExpert, ScriptedWorker, Stack, picture, until
from tests.server.gateway.test_image_loading import data_url


def client(gateway: Stack, **options) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", **{"api_key": "any", "max_retries": 0, **options})


HI = [{"role": "user", "content": "Hi"}]


async def test_chat(gateway: Stack) -> None:
    async with client(gateway) as api:
        answer = await api.chat.completions.create(model="base", messages=HI, temperature=0)
        assert answer.choices[0].message.content == "Hello world"
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.total_tokens == 7
        assert answer._request_id.startswith("req-")


async def test_chat_streamed(gateway: Stack) -> None:
    async with client(gateway) as api:
        stream = await api.chat.completions.create(
            model="base", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello world"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.completion_tokens == 2


async def test_the_stream_helper(gateway: Stack) -> None:
    async with client(gateway) as api, api.chat.completions.stream(model="base", messages=HI) as stream:
        final = await stream.get_final_completion()
        assert final.choices[0].message.content == "Hello world"


async def test_completions_and_models(gateway: Stack) -> None:
    async with client(gateway) as api:
        answer = await api.completions.create(model="alpaca", prompt=["a", "b"], max_tokens=5)
        assert [choice.text for choice in answer.choices] == ["Hello world"] * 2
        stream = await api.completions.create(model="alpaca", prompt="a", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello world"
        assert [model.id async for model in api.models.list()] == ["base", "alpaca", "org/sees"]
        assert (await api.models.retrieve("org/sees")).id == "org/sees"


async def test_images_and_extensions(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, experts={"ocr": ScriptedExpert("ocr", "Total 5")})
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Total?"},
                {"type": "image_url", "image_url": {"url": data_url(picture())}},
            ],
        }
    ]
    async with client(gateway) as api:
        answer = await api.chat.completions.create(
            model="org/sees", messages=messages, extra_body={"experts": ["ocr"], "ignore_eos": True}
        )
        assert answer.experts[0]["text"] == "Total 5"
        assert worker.requests[0].sampling.ignore_eos


async def test_errors_become_the_clients_own(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, api_keys=("right",))
    async with client(gateway, api_key="wrong") as api:
        with pytest.raises(openai.AuthenticationError):
            await api.models.list()
    async with client(gateway, api_key="right") as api:
        with pytest.raises(openai.NotFoundError) as missing:
            await api.chat.completions.create(model="gpt-4o", messages=HI)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await api.chat.completions.create(model="base", messages=HI, temperature=3)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as unsupported:
            await api.chat.completions.create(model="base", messages=HI, functions=[{"name": "f"}])
        assert unsupported.value.param == "functions"


async def test_a_full_queue_is_retried_by_the_client(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.refusal = RateLimited("full", retry_after=1)
    async with client(gateway, max_retries=2) as api:
        request = asyncio.create_task(api.chat.completions.create(model="base", messages=HI))
        await until(lambda: len(worker.requests) == 1)
        worker.refusal = None
        assert (await request).choices[0].message.content == "Hello world"


async def test_a_stream_that_breaks_raises(gateway: Stack, worker: ScriptedWorker) -> None:
    async def script(_: object):
        yield Started(1)
        yield Delta("some", (1,))
        raise Died

    worker.script = script
    async with client(gateway) as api:
        stream = await api.chat.completions.create(model="base", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in stream:
                pass


async def test_closing_a_stream_aborts_the_request(gateway: Stack, worker: ScriptedWorker) -> None:
    async def script(_: object):
        yield Started(1)
        while True:
            yield Delta("x", (1,))
            await asyncio.sleep(0.02)

    worker.script = script
    async with client(gateway) as api:
        stream = await api.chat.completions.create(model="base", messages=HI, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await asyncio.wait_for(worker.closed.wait(), 10)
