"""The Responses API on the wire: what the worker is asked, and what clients are told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from server.errors import InvalidRequest
from server.gateway.parsing import parse
from server.gateway.responses.schemas import ResponseRequest
from server.serving import Drain
from server.worker.messages import (
    ChatMessage,
    Delta,
    Event,
    Failed,
    Finished,
    Grammar,
    Started,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from tests.server.gateway.scripted import (
    Died,
    Launch,
    ScriptedExpert,
    ScriptedWorker,
    Stack,
    picture,
    story,
    until,
)
from tests.server.gateway.test_image_loading import data_url
from tests.server.gateway.test_tools import CITY, SCHEMAS, calling

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": CITY,
    "strict": True,
}
NOW = {"type": "function", "name": "now"}
TOOLS = [WEATHER, NOW]
JSON_CITY = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
IMAGE = {"type": "input_image", "image_url": data_url(picture()), "detail": "auto"}


async def ask(gateway: Stack, input: Any = "Hi", **fields: Any) -> httpx.Response:
    return await gateway.http.post("/v1/responses", json={"model": "base", "input": input, **fields})


async def told(gateway: Stack, **fields: Any) -> list[dict[str, Any]]:
    """A stream's events; each is named as its type says, and fits the stock client's types."""
    response = await ask(gateway, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENT.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def without_ids(found: Any) -> Any:
    """Items' own ids, which differ from one answer to the next, made alike."""
    if isinstance(found, dict):
        return {
            name: name if name in ("id", "item_id", "call_id", "created_at") else without_ids(value)
            for name, value in found.items()
        }
    return [without_ids(item) for item in found] if isinstance(found, list) else found


async def test_an_answer_has_every_field_that_clients_read(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = story("Hello", " world", cached=4)
    response = await ask(
        gateway, instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=9, user="me"
    )
    body = response.json()
    assert response.status_code == 200, body
    Response.model_validate(body)
    assert body["id"].startswith("resp_")
    assert isinstance(body["created_at"], int)
    assert body["output"][0]["id"].startswith("msg_")
    part = {"type": "output_text", "text": "Hello world", "annotations": [], "logprobs": []}
    assert without_ids(body) == {
        "id": "id",
        "object": "response",
        "created_at": "created_at",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": "Be kind.",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "model": "base",
        "output": [
            {"id": "id", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 7,
        },
        "user": "me",
    }
    (asked,) = worker.requests
    assert asked.prompt.messages == (ChatMessage("system", "Be kind."), ChatMessage("user", "Hi"))
    assert asked.sampling.max_tokens == 9
    assert asked.sampling.logprobs is None


async def test_a_stream_has_the_form_that_clients_parse(gateway: Stack) -> None:
    events = await told(gateway)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["delta"] for event in events if "delta" in event] == ["Hello", " world"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["usage"] is None
    final = events[-1]["response"]
    assert final["output"] == [events[-2]["item"]]
    assert final["output"][0]["content"] == [events[-3]["part"]]
    assert {e["item_id"] for e in events if "item_id" in e} == {final["output"][0]["id"]}
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1


async def test_a_stream_ends_with_what_is_answered_without_one(
    gateway: Stack, worker: ScriptedWorker
) -> None:
    worker.events = calling()
    fields = {"tools": TOOLS, "top_logprobs": 1, "temperature": 0.5}
    whole = (await ask(gateway, **fields)).json()
    streamed = (await told(gateway, **fields))[-1]["response"]
    assert without_ids(streamed) == without_ids(whole)


async def test_calls_of_an_answer(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = calling()
    events = await told(gateway, tools=TOOLS)
    assert [event["type"].removeprefix("response.") for event in events[5:]] == [
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    said, weather, now = events[-1]["response"]["output"]
    assert said["content"][0]["text"] == "Let me see."
    assert (weather["name"], weather["arguments"]) == ("weather", '{"city": "Rome"}')
    assert (now["name"], now["arguments"], now["status"]) == ("now", "{}", "completed")
    assert weather["id"].startswith("fc_")
    assert weather["call_id"].startswith("call_")
    assert weather["call_id"] != now["call_id"]
    assert [e["output_index"] for e in events if e["type"].endswith("item.added")] == [0, 1, 2]
    added = [event["item"] for event in events if event["type"].endswith("item.added")]
    assert (added[1]["call_id"], added[1]["arguments"]) == (weather["call_id"], "")


async def test_a_conversation_with_calls_comes_back(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = calling()
    answer = (await ask(gateway, tools=TOOLS)).json()
    weather, now = answer["output"][1:]
    worker.events = story("Sunny.")
    results = [
        {"type": "function_call_output", "call_id": weather["call_id"], "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": now["call_id"],
            "output": [{"type": "input_text", "text": "at"}, {"type": "input_text", "text": "noon"}],
        },
    ]
    asked = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Sun?"}, {"type": "input_text", "text": "!"}],
        },
    ]
    response = await ask(gateway, [*asked, *answer["output"], *results], tools=TOOLS, tool_choice="none")
    assert response.status_code == 200, response.text
    calls = (
        ToolCall(weather["call_id"], "weather", '{"city": "Rome"}'),
        ToolCall(now["call_id"], "now", "{}"),
    )
    assert worker.requests[-1].prompt.messages == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "Sun?\n!"),
        ChatMessage("assistant", "Let me see.", calls),
        ChatMessage("tool", "sunny", (), weather["call_id"]),
        ChatMessage("tool", "at\nnoon", (), now["call_id"]),
    )
    assert worker.requests[-1].prompt.tools == ()


async def test_calls_after_a_result_are_a_message_of_their_own(
    gateway: Stack, worker: ScriptedWorker
) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "1", "output": "noon"}
    await ask(gateway, [call, result, call | {"call_id": "2"}, result | {"call_id": "2"}])
    roles = [(message.role, len(message.tool_calls)) for message in worker.requests[0].prompt.messages]
    assert roles == [("assistant", 1), ("tool", 0), ("assistant", 1), ("tool", 0)]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_long_text_is_not_looked_at_sign_by_sign(role: str) -> None:
    """32 MB of it would take four seconds."""
    content = "x" * 32_000_000
    raw = json.dumps({"model": "base", "input": [{"role": role, "content": content}]}).encode()
    begun = time.process_time()
    body = parse(ResponseRequest, raw)
    assert list(body.image_urls) == []
    assert time.process_time() - begun < 1.0


def test_many_calls_in_a_row_are_read_in_time_that_grows_with_their_number() -> None:
    """All that a body may hold: copied once for each, they would take eight seconds."""
    call = {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"}
    body = ResponseRequest.model_validate({"model": "base", "input": [call] * 50_000})
    begun = time.process_time()
    (message,) = body.for_worker()
    assert time.process_time() - begun < 3
    assert len(message.tool_calls) == 50_000


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"text": {}}, None),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, None),
        ({"text": {"format": {"type": "json_object"}}}, Grammar("json_object")),
        ({"text": JSON_CITY}, Grammar("json_schema", CITY)),
        ({"tools": TOOLS}, Grammar("text", None, SCHEMAS)),
        ({"tools": TOOLS, "parallel_tool_calls": False}, Grammar("text", None, SCHEMAS, False)),
        ({"tools": TOOLS, "tool_choice": "required"}, Grammar("tool_calls", None, SCHEMAS)),
        ({"tools": TOOLS, "tool_choice": "none", "text": JSON_CITY}, Grammar("json_schema", CITY)),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "name": "now"}},
            Grammar("tool_calls", None, SCHEMAS[1:], False),
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NOW]}},
            Grammar("text", None, SCHEMAS[1:]),
        ),
    ],
)
async def test_what_the_worker_is_asked(
    gateway: Stack, worker: ScriptedWorker, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    answer = await ask(gateway, **fields)
    assert answer.status_code == 200, answer.text
    assert worker.requests[0].sampling.grammar == grammar
    Response.model_validate(answer.json())
    for name in ("text", "tool_choice"):
        if fields.get(name):
            assert answer.json()[name] == fields[name] or name == "text"
    silent = fields.get("tool_choice") == "none" or "tools" not in fields
    names = [tool["function"]["name"] for tool in worker.requests[0].prompt.tools]
    assert names == ([] if silent else ["weather", "now"])


async def test_an_answer_that_is_cut_off(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = story("Hello", finish_reason="length")
    events = await told(gateway, max_output_tokens=1)
    assert events[-1]["type"] == "response.incomplete"
    final = events[-1]["response"]
    assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert final["output"][0]["status"] == "incomplete"
    assert events[-2]["item"]["status"] == "incomplete"


async def test_an_empty_answer_is_an_empty_text(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = story()
    (item,) = (await ask(gateway)).json()["output"]
    assert item["content"][0]["text"] == ""


@pytest.mark.parametrize("fields", [{"top_logprobs": 1}, {"include": ["message.output_text.logprobs"]}])
async def test_log_probabilities(gateway: Stack, worker: ScriptedWorker, fields: dict[str, Any]) -> None:
    best = (TopLogprob(1, "He", -0.5),) if "top_logprobs" in fields else ()
    worker.events = [
        Started(5),
        Delta("", (1,), (TokenLogprob(1, "He", -0.5, best),)),
        Delta("Hello", (2,), (TokenLogprob(2, "llo", -1.0, best),)),
        Delta("\N{SNOWMAN}", (3,), (TokenLogprob(3, "\N{REPLACEMENT CHARACTER}", -1.5, best, (226, 152)),)),
        Delta("", (4,), (TokenLogprob(4, "</s>", -2.0, best),)),
        Finished("stop", Usage(5, 4)),
    ]
    events = await told(gateway, **fields)
    assert worker.requests[0].sampling.logprobs == len(best)
    delta, _ = (event for event in events if event["type"].endswith("text.delta"))
    assert [token["token"] for token in delta["logprobs"]] == ["He", "llo"]
    scored = events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [token["logprob"] for token in scored] == [-0.5, -1.0, -1.5, -2.0]
    assert scored[0]["bytes"] == [72, 101]
    assert scored[2]["bytes"] == [226, 152]  # a part of a character
    assert [top["token"] for top in scored[0]["top_logprobs"]] == [token.token for token in best]


async def test_images_and_experts(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, experts={"ocr": ScriptedExpert("ocr", "Total 5")})
    input = [{"role": "user", "content": [{"type": "input_text", "text": "Total?"}, IMAGE]}]
    events = await told(gateway, input=input, model="org/sees")
    assert worker.requests[0].images == (picture(),)
    assert worker.requests[0].prompt.context[0].text == "Total 5"
    for event in (events[0], events[-1]):
        assert event["response"]["experts"][0]["text"] == "Total 5"
    blind = await ask(gateway, input, experts=[])
    assert blind.status_code == 200
    assert worker.requests[1].prompt.context == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments"),
        (
            {"input": [{"type": "function_call_output", "call_id": "1", "output": [IMAGE]}]},
            "input[0].output[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "1"}]}]},
            "input[0].content[0]",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "1"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"role": "assistant", "content": [IMAGE]}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "ftp://x"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "name": "x"}]}, "tools[0].type"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"min_tokens": 3, "max_output_tokens": 2}, "min_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": dict.fromkeys("abcdefghijklmnopq", "")}, "metadata"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"experts": ["none"]}, "experts[0]"),
    ],
)
async def test_mistakes_are_named(gateway: Stack, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = await gateway.http.post(
            "/v1/responses", json={"model": "base", "input": "Hi", "stream": stream, **fields}
        )
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [{}] * 300_000},
        {"input": [{"role": "user", "content": [{}] * 300_000}]},
        {"input": [{"type": "function_call_output", "call_id": "1", "output": [{}] * 300_000}]},
        {"tools": [{}] * 300_000},
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{}] * 300_000}},
        {"include": [1] * 300_000},
        {"metadata": {str(i): 1 for i in range(300_000)}},
    ],
)
def test_many_mistakes_cost_no_more_than_one(fields: dict[str, Any]) -> None:
    raw = json.dumps({"model": "base", "input": "Hi"} | fields).encode()
    begun = time.process_time()
    with pytest.raises(InvalidRequest):
        parse(ResponseRequest, raw)
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize("stream", ["true", "false"])
async def test_numbers_that_json_cannot_hold_are_refused_or_left_out(gateway: Stack, stream: str) -> None:
    async def answer(fields: str) -> httpx.Response:
        body = f'{{"model": "base", "input": "Hi", "stream": {stream}, {fields}}}'
        return await gateway.http.post("/v1/responses", content=body)

    schema = '{"type": "json_schema", "name": "x", "schema": {"minimum": 1e999}}'
    refused = await answer(f'"text": {{"format": {schema}}}')
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "text.format.schema"
    tools = '[{"type": "function", "name": "now", "size": 1e999}]'
    for unknown in (
        '"text": {"format": {"type": "text", "size": 1e999}, "size": 1e999}',
        '"tool_choice": {"type": "function", "name": "now", "size": 1e999}',
        f'"tool_choice": {{"type": "allowed_tools", "mode": "auto", "tools": {tools}, "size": 1e999}}',
    ):
        heard = await answer(f'"tools": {tools}, {unknown}')
        assert heard.status_code == 200, heard.text
        assert "size" not in heard.text


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("max_tokens", 5, "send max_output_tokens."),
        ("max_completion_tokens", 5, "send max_output_tokens."),
        ("response_format", {"type": "json_object"}, "send text.format."),
        ("messages", [{"role": "user", "content": "Hi"}], "send input."),
        ("functions", [NOW], "send tools."),
        ("function_call", {"name": "now"}, "send tool_choice."),
        ("logprobs", True, 'send include: ["message.output_text.logprobs"].'),
        ("n", 2, "leave it out."),
    ],
)
async def test_what_chat_calls_otherwise_is_refused(
    gateway: Stack, field: str, value: Any, advice: str
) -> None:
    response = await ask(gateway, **{field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert error["message"].endswith(advice)


async def test_what_chat_calls_otherwise_may_ask_for_nothing(gateway: Stack) -> None:
    nothing = {"max_tokens": None, "n": 1, "logprobs": False, "response_format": {"type": "text"}}
    assert (await ask(gateway, **nothing)).status_code == 200


async def test_images_that_nobody_would_see(gateway: Stack) -> None:
    refused = await ask(gateway, [{"role": "user", "content": [IMAGE]}])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "param", "told", "own"),
    [
        ("response_format: no.", "response_format", "text.format: no.", "text.format"),
        ("messages: lower max_tokens.", "messages", "input: lower max_output_tokens.", "input"),
        ("Not with response_format or tools.", "ignore_eos", "Not with text.format or tools.", "ignore_eos"),
        ("Such messages: no.", None, "Such messages: no.", None),
    ],
)
async def test_a_workers_refusal_names_the_fields_as_they_are_called_here(
    gateway: Stack, worker: ScriptedWorker, stream: bool, said: str, param: str, told: str, own: str
) -> None:
    worker.refusal = InvalidRequest(said, param=param, code="invalid_schema")
    error = (await ask(gateway, stream=stream)).json()["error"]
    assert (error["message"], error["param"], error["code"]) == (told, own, "invalid_schema")


async def test_nothing_is_kept(gateway: Stack) -> None:
    made = (await ask(gateway, store=True)).json()
    assert made["store"] is False
    found = await gateway.http.get(f"/v1/responses/{made['id']}")
    assert found.status_code == 404
    assert "none is kept" in found.json()["error"]["message"]


def client(gateway: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0)


class City(BaseModel):
    city: str


async def test_the_stock_client(gateway: Stack, worker: ScriptedWorker) -> None:
    async with client(gateway) as api:
        answer = await api.responses.create(model="base", input="Hi", temperature=0)
        assert answer.output_text == "Hello world"
        async with api.responses.stream(model="base", input="Hi") as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            assert deltas == ["Hello", " world"]
            assert (await stream.get_final_response()).output_text == "Hello world"
        worker.events = story('{"city": "Rome"}')
        parsed = await api.responses.parse(model="base", input="Where?", text_format=City)
        assert parsed.output_parsed == City(city="Rome")
        assert worker.requests[-1].sampling.grammar.kind == "json_schema"
        worker.events = [
            Started(5),
            Delta("", (1,), (), (ToolCallDelta(0, "weather", '{"city": "Rome"}'),)),
            Finished("tool_calls", Usage(5, 1)),
        ]
        called = await api.responses.create(model="base", input="Sun?", tools=TOOLS)
        assert [(call.type, call.name) for call in called.output] == [("function_call", "weather")]


async def breaking(_: object) -> AsyncGenerator[Event, None]:
    yield Started(1)
    yield Delta("some", (1,))
    raise Died


async def hanging(_: object) -> AsyncGenerator[Event, None]:
    yield Started(1)
    yield Delta("some", (1,))
    await asyncio.Event().wait()


async def failing(_: object) -> AsyncGenerator[Event, None]:
    """A step failed; see `bug` for one of the gateway's own."""
    yield Started(1)
    yield Delta("some", (1,))
    yield Failed(500, "The step failed.", "server_error", "internal_error")


def bug(*_: object) -> NoReturn:
    raise ZeroDivisionError


FAILURES = [  # and within how many seconds
    (breaking, 60, "unavailable", "broke off"),
    (failing, 60, "internal_error", "The step failed."),
    (hanging, 1, "timeout", "deadline"),
]


@pytest.mark.parametrize(("script", "seconds", "code", "says"), FAILURES)
async def test_a_stream_that_fails_says_so_in_its_last_event(
    launch: Launch, worker: ScriptedWorker, script: Any, seconds: int, code: str, says: str
) -> None:
    worker.script = script
    gateway = await launch(worker, request_seconds=seconds)
    *_, last = await told(gateway)
    assert (last["type"], last["code"], last["param"]) == ("error", code, None)
    assert says in last["message"]
    assert last["message"] == last["error"]["message"]


@pytest.mark.parametrize(("script", "seconds", "code", "says"), FAILURES)
async def test_a_stream_that_fails_raises(
    launch: Launch, worker: ScriptedWorker, script: Any, seconds: int, code: str, says: str
) -> None:
    worker.script = script
    gateway = await launch(worker, request_seconds=seconds)
    async with client(gateway) as api:
        stream = await api.responses.create(model="base", input="Hi", stream=True)
        with pytest.raises(openai.APIError, match=says) as raised:
            async for _ in stream:
                pass
        assert raised.value.code == code


async def test_so_does_one_that_the_server_fails_on_itself(
    gateway: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.gateway.responses.output.Output.finish", bug)
    *_, last = await told(gateway)
    assert (last["type"], last["code"]) == ("error", "internal_error")


async def test_so_does_one_that_an_expired_drain_ends(launch: Launch, worker: ScriptedWorker) -> None:
    worker.script = hanging
    drain = Drain()
    gateway = await launch(worker, drain=drain)
    answer = asyncio.create_task(told(gateway))
    await until(lambda: len(worker.requests) == 1)
    await asyncio.sleep(0.2)  # its first events arrive
    drain.ask()
    drain.expired.set()
    last = (await answer)[-1]
    assert (last["type"], last["code"]) == ("error", "unavailable")
