"""Chat completions as clients of OpenAI's API depend on them."""

from __future__ import annotations

import asyncio
import json
import math
import threading

import pytest

from server.errors import RateLimited
from server.gateway.answers import json_answer
from server.worker.messages import (
    ChatMessage,
    Delta,
    Failed,
    Finished,
    Started,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from tests.server.gateway.scripted import Died, Launch, ScriptedWorker, Stack, story, until


async def test_an_answer_has_every_field_that_clients_read(gateway: Stack, worker: ScriptedWorker) -> None:
    response = await gateway.chat()
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "base",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }


async def test_a_stream_has_the_form_that_clients_parse(gateway: Stack) -> None:
    *chunks, done = await gateway.chunks()
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " world"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert all(type(choice["index"]) is int for choice in choices)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk or "experts" in chunk for chunk in chunks)
    assert not any("tool_calls" in choice["delta"] for choice in choices)


async def test_usage_comes_in_a_last_chunk_of_its_own(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = story("a", "b", "c", prompt_tokens=9, finish_reason="length", cached=4)
    *chunks, last, done = await gateway.chunks(stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_a_stream_is_not_buffered(gateway: Stack, worker: ScriptedWorker) -> None:
    go_on = asyncio.Event()

    async def script(_: object):
        yield Started(3)
        yield Delta("first", (1,))
        await go_on.wait()
        yield Finished("stop", Usage(3, 1))

    worker.script = script
    body = {"model": "base", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        seen = ""
        async for text in response.aiter_text():
            seen += text
            if "first" in seen and not go_on.is_set():  # it came before the worker went on
                go_on.set()
    assert seen.endswith("data: [DONE]\n\n")


async def test_every_sampling_field_reaches_the_worker(gateway: Stack, worker: ScriptedWorker) -> None:
    fields = {
        "temperature": 0.3, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "stop": ["\n", "END"],
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
        "logit_bias": {"11": -100, "12": 5.5}, "max_completion_tokens": 33, "max_tokens": 99,
        "min_tokens": 2, "ignore_eos": True, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    assert (await gateway.chat(**fields)).status_code == 200
    sampling = worker.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.9, 40, 0.05)
    assert (sampling.seed, sampling.stop, sampling.max_tokens, sampling.min_tokens) == (
        7,
        ("\n", "END"),
        33,
        2,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.1, {11: -100.0, 12: 5.5})
    assert (sampling.ignore_eos, sampling.logprobs, sampling.prompt_logprobs) == (True, 3, None)


async def test_explicit_nulls_mean_the_defaults(gateway: Stack, worker: ScriptedWorker) -> None:
    names = (
        "temperature top_p top_k min_p seed stop presence_penalty frequency_penalty repetition_penalty "
        "logit_bias max_tokens max_completion_tokens min_tokens ignore_eos logprobs top_logprobs n stream "
        "stream_options user tools tool_choice response_format experts functions"
    )
    plain = await gateway.chat()
    nulls = await gateway.chat(**dict.fromkeys(names.split()))
    assert plain.status_code == nulls.status_code == 200
    assert worker.requests[0].sampling == worker.requests[1].sampling
    assert worker.requests[0].sampling.temperature == 1.0
    assert worker.requests[0].sampling.max_tokens is None


async def test_roles_and_parts(gateway: Stack, worker: ScriptedWorker) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 42.", "refusal": None},
        {"role": "user", "content": "", "name": "Ann"},
    ]
    assert (await gateway.chat(messages=messages)).status_code == 200
    assert worker.requests[0].prompt.messages == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "one\ntwo"),
        ChatMessage("assistant", "", (ToolCall("c1", "f", "{}"),)),
        ChatMessage("tool", "42", (), "c1"),
        ChatMessage("assistant", "It is 42."),
        ChatMessage("user", ""),
    )


async def test_several_choices(gateway: Stack, worker: ScriptedWorker) -> None:
    async def script(request):
        for event in story(f"choice {request.request_id.rpartition('-')[2]}", prompt_tokens=4):
            yield event

    worker.script = script
    body = (await gateway.chat(n=3, seed=10)).json()
    assert [(c["index"], c["message"]["content"]) for c in body["choices"]] == [
        (0, "choice 0"),
        (1, "choice 1"),
        (2, "choice 2"),
    ]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert sorted(request.sampling.seed for request in worker.requests) == [10, 11, 12]
    assert {request.request_id for request in worker.requests} == {f"{body['id']}-{i}" for i in range(3)}

    *chunks, usage, _ = await gateway.chunks(n=2, stream_options={"include_usage": True})
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["delta"] for choice in mine] == [
            {"role": "assistant", "content": ""},
            {"content": f"choice {index}"},
            {},
        ]
        assert mine[-1]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 2


async def test_answers_are_made_beside_the_event_loop() -> None:
    """Those with log-probabilities may have 30 MB and take seconds."""
    response = await json_answer(lambda: {"thread": threading.get_ident(), "text": "\u2028é"})
    body = json.loads(response.body)
    assert body["thread"] != threading.get_ident()
    assert body["text"] == "\u2028é"


async def test_logprobs(gateway: Stack, worker: ScriptedWorker) -> None:
    best = (TopLogprob(5, "né", -0.1), TopLogprob(6, "\N{REPLACEMENT CHARACTER}", -2.5, (240, 159)))
    tokens = (TokenLogprob(5, "né", -0.1, best),)
    worker.events = [Started(1), Delta("né", (5,), tokens), Finished("stop", Usage(1, 1))]
    expected = {
        "content": [
            {
                "token": "né",
                "logprob": -0.1,
                "bytes": [110, 195, 169],
                "top_logprobs": [
                    {"token": "né", "logprob": -0.1, "bytes": [110, 195, 169]},
                    {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -2.5, "bytes": [240, 159]},
                ],
            }
        ],
        "refusal": None,
    }
    body = (await gateway.chat(logprobs=True, top_logprobs=2)).json()
    assert body["choices"][0]["logprobs"] == expected
    chunks = await gateway.chunks(logprobs=True, top_logprobs=2)
    assert chunks[1]["choices"][0]["logprobs"] == expected
    assert chunks[2]["choices"][0]["logprobs"] is None


async def test_line_separators_in_a_text_survive(gateway: Stack, worker: ScriptedWorker) -> None:
    text = "a\u2028b\u2029c\x85d\re\nf\x0bg \N{GRINNING FACE}"
    worker.events = story(text)
    assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == text
    chunks = await gateway.chunks()
    assert chunks[1]["choices"][0]["delta"]["content"] == text


async def test_an_unknown_model_is_never_replaced(gateway: Stack, worker: ScriptedWorker) -> None:
    for stream in (False, True):
        response = await gateway.chat(model="gpt-4o", stream=stream)
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "gpt-4o" in error["message"]
    assert worker.requests == []


async def test_a_refusal_before_the_first_event_is_a_status(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.refusal = RateLimited("The queue is full.", retry_after=3)
    for stream in (False, True):
        response = await gateway.chat(stream=stream)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.headers["content-type"] == "application/json"
        assert response.json()["error"] == {
            "message": "The queue is full.",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        }


async def test_one_refused_choice_refuses_all(gateway: Stack, worker: ScriptedWorker) -> None:
    async def script(request):
        if request.request_id.endswith("-1"):
            yield Failed(429, "full", "rate_limit_error", "rate_limit_exceeded")
        else:
            yield Started(1)
            await asyncio.sleep(60)

    worker.script = script
    response = await gateway.chat(n=2, stream=True)
    assert response.status_code == 429
    await asyncio.wait_for(worker.closed.wait(), 5)  # the accepted one was aborted


async def _die(_: object):
    yield Started(1)
    yield Delta("some", (1,))
    raise Died


async def _fail(_: object):
    yield Started(1)
    yield Delta("some", (1,))
    yield Failed(503, "The worker is shutting down.", "server_error", "unavailable")


async def _end_early(_: object):
    yield Started(1)
    yield Delta("some", (1,))


async def _talk_nonsense(_: object):
    yield Started(1)
    yield Delta("some", (1,))
    yield Delta(math.pi, (2,))  # type: ignore[arg-type]


async def _abort(_: object):
    yield Started(1)
    yield Delta("some", (1,))
    yield Finished("abort", Usage(1, 1))


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("script", [_die, _fail, _end_early, _talk_nonsense, _abort])
async def test_a_worker_lost_in_the_middle_is_said(gateway: Stack, worker: ScriptedWorker, script) -> None:
    worker.script = script
    chunks = await gateway.chunks()
    assert chunks[1]["choices"][0]["delta"] == {"content": "some"}
    assert set(chunks[-1]) == {"error"}
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in chunks
    response = await gateway.chat()
    assert response.status_code in (500, 503)
    assert ("retry-after" in response.headers) == (response.status_code == 503)
    assert response.json()["error"]["type"] == "server_error"
    text = (await gateway.http.get("/metrics")).text  # both count as failed
    of_chat = 'llama_adapter:http_requests_total{route="/v1/chat/completions"'
    counted = [line for line in text.splitlines() if line.startswith(of_chat)]
    assert counted == [f'{of_chat},status="{response.status_code}"}} 2.0']


async def test_a_stalled_worker_is_a_timeout(launch: Launch, worker: ScriptedWorker) -> None:
    async def script(_: object):
        yield Started(1)
        await asyncio.sleep(60)

    worker.script = script
    gateway = await launch(worker, worker_read_seconds=0.2)
    response = await gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    chunks = await gateway.chunks()
    assert chunks[-1]["error"]["code"] == "timeout"


async def test_a_request_has_a_deadline(launch: Launch, worker: ScriptedWorker) -> None:
    async def script(_: object):
        yield Started(1)
        while True:
            await asyncio.sleep(0.02)
            yield Delta("x", (1,))

    worker.script = script
    gateway = await launch(worker, request_seconds=2)
    response = await gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert 0 < worker.requests[0].timeout_seconds <= 2
    chunks = await gateway.chunks()
    assert chunks[-1]["error"]["code"] == "timeout"
    await asyncio.wait_for(worker.closed.wait(), 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_vanished_client_aborts_the_request(
    gateway: Stack, worker: ScriptedWorker, stream: bool
) -> None:
    async def script(_: object):
        yield Started(1)
        while True:
            yield Delta("x", (1,))
            await asyncio.sleep(0.02)

    worker.script = script
    request = asyncio.create_task(gateway.chat(stream=stream))
    await until(lambda: bool(worker.requests))
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await asyncio.wait_for(worker.closed.wait(), 10)


async def test_a_client_that_leaves_before_the_first_event(gateway: Stack, worker: ScriptedWorker) -> None:
    async def script(_: object):
        await asyncio.sleep(60)
        yield Started(1)

    worker.script = script
    request = asyncio.create_task(gateway.chat(stream=True))
    await until(lambda: bool(worker.requests))
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await asyncio.wait_for(worker.closed.wait(), 10)
