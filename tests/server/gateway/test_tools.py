"""Response formats and tools on the wire: what the worker is asked, and what clients get of its calls."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from server.errors import InvalidRequest
from server.worker.messages import (
    Delta,
    Event,
    Finished,
    Grammar,
    Started,
    TokenLogprob,
    ToolCallDelta,
    ToolSchema,
    Usage,
)
from tests.server.gateway.scripted import ScriptedWorker, Stack

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": CITY, "strict": True},
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = (ToolSchema("weather", CITY, True), ToolSchema("now", NO_ARGUMENTS))
JSON_CITY = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
CALLED = {"type": "function", "function": {"name": "now"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    named = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


def calling() -> list[Event]:
    """Some text, then two calls, the first in pieces."""
    return [
        Started(5),
        Delta("Let me see.", (1,), (TokenLogprob(1, "Let me see.", -0.5),)),
        Delta("", (2,), (TokenLogprob(2, "{", -0.25),), (ToolCallDelta(0, "weather", ""),)),
        Delta("", (3,), (TokenLogprob(3, "x", -1.0),)),
        Delta("", (4,), (), (ToolCallDelta(0, None, '{"city"'),)),
        Delta("", (5,), (), (ToolCallDelta(0, None, ': "Rome"}'), ToolCallDelta(1, "now", "{}"))),
        Finished("tool_calls", Usage(5, 5)),
    ]


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        ({"response_format": JSON_CITY}, Grammar("json_schema", CITY)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            Grammar("json_object"),
        ),
        ({"tools": TOOLS}, Grammar("text", None, SCHEMAS)),
        ({"tools": TOOLS, "tool_choice": "auto"}, Grammar("text", None, SCHEMAS)),
        ({"tools": TOOLS, "parallel_tool_calls": False}, Grammar("text", None, SCHEMAS, False)),
        ({"tools": TOOLS, "tool_choice": "none"}, None),
        ({"tools": TOOLS, "tool_choice": "required"}, Grammar("tool_calls", None, SCHEMAS)),
        ({"tools": TOOLS, "tool_choice": CALLED}, Grammar("tool_calls", None, SCHEMAS[1:], False)),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "now")}, Grammar("text", None, SCHEMAS[1:])),
        (
            {"tools": TOOLS, "tool_choice": allowed("required", "now", "weather")},
            Grammar("tool_calls", None, SCHEMAS),
        ),
        ({"tools": TOOLS, "response_format": JSON_CITY}, Grammar("json_schema", CITY, SCHEMAS)),
        (
            {"tools": TOOLS, "tool_choice": allowed("auto", "weather"), "response_format": JSON_CITY},
            Grammar("json_schema", CITY, SCHEMAS[:1]),
        ),
        (
            {"tools": TOOLS, "tool_choice": "none", "response_format": JSON_CITY},
            Grammar("json_schema", CITY),
        ),
    ],
)
async def test_what_the_worker_is_asked(
    gateway: Stack, worker: ScriptedWorker, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    answer = await gateway.chat(**fields, n=2)
    assert answer.status_code == 200, answer.text
    assert [request.sampling.grammar for request in worker.requests] == [grammar] * 2
    told = [tool["function"]["name"] for tool in worker.requests[0].prompt.tools]
    silent = fields.get("tool_choice") == "none" or "tools" not in fields
    assert told == ([] if silent else ["weather", "now"])


async def test_a_description_reaches_the_template(gateway: Stack, worker: ScriptedWorker) -> None:
    await gateway.chat(tools=TOOLS)
    assert worker.requests[0].prompt.tools == (
        {
            "type": "function",
            "function": {"name": "weather", "description": "of a city", "parameters": CITY},
        },
        {"type": "function", "function": {"name": "now"}},
    )


async def test_calls_of_an_answer(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = calling()
    (choice,) = (await gateway.chat(tools=TOOLS, logprobs=True)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me see."
    calls = message["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": '{"city": "Rome"}'},
        {"name": "now", "arguments": "{}"},
    ]
    assert {call["type"] for call in calls} == {"function"}
    assert len({call["id"] for call in calls}) == 2
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["Let me see.", "{", "x"]


async def test_content_is_null_beside_calls_alone(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = [Started(1), *calling()[2:]]
    (choice,) = (await gateway.chat(tools=TOOLS)).json()["choices"]
    assert choice["message"]["content"] is None


async def test_no_calls_no_field(gateway: Stack) -> None:
    (choice,) = (await gateway.chat(tools=TOOLS)).json()["choices"]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


async def test_calls_of_a_stream(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = calling()
    *chunks, done = await gateway.chunks(tools=TOOLS, logprobs=True)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    ids = [piece["id"] for delta in deltas for piece in delta.get("tool_calls", ()) if "id" in piece]
    assert len(set(ids)) == 2
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Let me see."},
        {"tool_calls": [_opened(0, ids[0], "weather", "")]},
        {"content": ""},  # a token of which nothing is known yet but its log-probability
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ': "Rome"}'}}]},
        {"tool_calls": [_opened(1, ids[1], "now", "{}")]},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * 7 + ["tool_calls"]
    scored = [
        [token["token"] for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
        for chunk in chunks
    ]
    assert scored == [[], ["Let me see."], ["{"], ["x"], [], [], [], []]


def _opened(index: int, id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": id, "type": "function", "function": function}


async def test_the_stock_client_puts_calls_together(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = calling()
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as api:
        async with api.chat.completions.stream(model="base", messages=messages, tools=TOOLS) as stream:
            final = await stream.get_final_completion()
        message = final.choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["weather", "now"]
        assert message.tool_calls[0].function.parsed_arguments == {"city": "Rome"}
        # And sends them back.
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in message.tool_calls
        ]
        await api.chat.completions.create(model="base", messages=[*messages, message, *results])
    sent = worker.requests[-1].prompt.messages
    assert [call.name for call in sent[1].tool_calls] == ["weather", "now"]
    assert [turn.tool_call_id for turn in sent[2:]] == [call.id for call in message.tool_calls]


async def test_what_the_worker_refuses_names_the_field(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.refusal = InvalidRequest("no", param="response_format", code="invalid_schema")
    answer = await gateway.chat(response_format=JSON_CITY)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
