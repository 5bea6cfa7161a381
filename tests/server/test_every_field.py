"""Whatever is accepted is honoured: every field of a request changes the answer, or is refused.

Answers are drawn with a seed, so that the same body gives the same answer and any change of the
distribution shows. The table is held to the schemas: a new field without a row fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from service import Service, serving

from server.gateway.responses.schemas import ResponseRequest
from server.gateway.schemas import ChatRequest, CompletionRequest

pytestmark = [pytest.mark.server, pytest.mark.weights, pytest.mark.timeout(300)]

END = 2  # SmolLM2's end of an answer
TOOL = {
    "type": "function",
    "function": {
        "name": "ring",
        "description": "Ring the bell.",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
COMMON = {"model": "smollm2-135m", "temperature": 1.5, "seed": 7, "ignore_eos": True}
ENDING = {"logit_bias": {str(END): 100}, "ignore_eos": False}
FREE = {"ignore_eos": False}
LONG = {"max_tokens": 64}
LONG_RESPONSE = {"max_output_tokens": 64}

Body = dict[str, Any]
# field → what the request has besides, and what the field adds to it (perhaps by the answer before)
Row = tuple[Body, Body | Callable[[str], Body]]

SAMPLED: dict[str, Row] = {
    "model": ({}, {"model": "nobody"}),
    "min_tokens": (ENDING, {"min_tokens": 5}),
    "temperature": ({}, {"temperature": 0}),
    "top_p": ({}, {"top_p": 0.05}),
    "top_k": ({}, {"top_k": 1}),
    "min_p": ({}, {"min_p": 1.0}),
    "seed": ({}, {"seed": 8}),
    "stop": ({}, lambda text: {"stop": [text[4:7]]}),
    "presence_penalty": (LONG, {"presence_penalty": 2}),
    "frequency_penalty": (LONG, {"frequency_penalty": 2}),
    "repetition_penalty": ({}, {"repetition_penalty": 5}),
    "logit_bias": ({}, {"logit_bias": {"5": 100}}),
    "stream": ({}, {"stream": True}),
    "ignore_eos": (ENDING, {"ignore_eos": True}),
}
SHARED = SAMPLED | {
    "max_tokens": ({}, {"max_tokens": 3}),
    "n": ({}, {"n": 2}),
    "stream_options": ({"stream": True}, {"stream_options": {"include_usage": True}}),
    "response_format": (FREE, {"response_format": {"type": "json_object"}}),
}
CHAT: dict[str, Row] = SHARED | {
    "messages": ({}, {"messages": [{"role": "user", "content": "Sing."}]}),
    "max_completion_tokens": ({}, {"max_completion_tokens": 3}),
    "logprobs": ({}, {"logprobs": True}),
    "top_logprobs": ({"logprobs": True}, {"top_logprobs": 3}),
    "tools": (FREE, {"tools": [TOOL]}),
    "tool_choice": (FREE | {"tools": [TOOL], "max_tokens": 40}, {"tool_choice": "required"}),
    "parallel_tool_calls": (
        FREE | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 80, "logit_bias": {str(END): -100}},
        {"parallel_tool_calls": False},
    ),
    "experts": ({}, {"experts": ["ocr"]}),
}
COMPLETIONS: dict[str, Row] = SHARED | {
    "prompt": ({}, {"prompt": "Two mice"}),
    "echo": ({}, {"echo": True}),
    "logprobs": ({}, {"logprobs": 2}),
}
CALLABLE = {"type": "function", **TOOL["function"]}
RESPONSES: dict[str, Row] = SAMPLED | {
    "presence_penalty": (LONG_RESPONSE, {"presence_penalty": 2}),
    "frequency_penalty": (LONG_RESPONSE, {"frequency_penalty": 2}),
    "input": ({}, {"input": "Sing."}),
    "instructions": ({}, {"instructions": "Rhyme."}),
    "max_output_tokens": ({}, {"max_output_tokens": 3}),
    "include": ({}, {"include": ["message.output_text.logprobs"]}),
    "top_logprobs": ({}, {"top_logprobs": 3}),
    "text": (FREE, {"text": {"format": {"type": "json_object"}}}),
    "tools": (FREE, {"tools": [CALLABLE]}),
    "tool_choice": (FREE | LONG_RESPONSE | {"tools": [CALLABLE]}, {"tool_choice": "required"}),
    "parallel_tool_calls": (
        FREE
        | {"tools": [CALLABLE], "tool_choice": "required", "max_output_tokens": 80}
        | {"logit_bias": {str(END): -100}},
        {"parallel_tool_calls": False},
    ),
    "metadata": ({}, {"metadata": {"a": "b"}}),
    "experts": ({}, {"experts": ["ocr"]}),
}
ROUTES = {
    "chat/completions": (
        CHAT,
        {"max_tokens": 16, "messages": [{"role": "user", "content": "Tell me of cats."}]},
    ),
    "responses": (RESPONSES, {"max_output_tokens": 16, "input": "Tell me of cats."}),
    "completions": (COMPLETIONS, {"max_tokens": 16, "prompt": "The cat"}),
}
ELSEWHERE = {
    "user",  # goes to the log: below
    "add_special_tokens",  # this base begins with none: tests/server/gateway/test_completions.py
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    # In bfloat16 a prompt from the cache is rounded otherwise than a whole one, and other tokens are drawn.
    with serving("--kv-cache-mib", "128", "--experts", "ocr", "--dtype", "float32") as service:
        yield service


def answer(service: Service, route: str, body: Body) -> tuple[Any, str]:
    """What is not the same in each answer anyway, and the first choice's text."""
    _, content = ROUTES[route]
    response = httpx.post(f"{service.url}/v1/{route}", json=COMMON | content | body, timeout=120)
    if "text/event-stream" in response.headers["content-type"]:
        lines = response.text.split("\n\n")
        return len(lines), ""
    found = response.json()
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, found
        return found["error"]["param"], ""
    told = {
        name: value for name, value in found.items() if name not in ("id", "created", "created_at", "usage")
    }
    read = found["usage"].get("prompt_tokens", found["usage"].get("input_tokens"))
    return (_without_ids(told), read), _text(found)


def _text(found: Body) -> str:
    if "output" in found:
        return "".join(part["text"] for item in found["output"] for part in item.get("content", ()))
    first = found["choices"][0]
    return first["message"]["content"] or "" if "message" in first else first["text"]


def _without_ids(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _without_ids(value) for name, value in found.items() if name not in ("id", "call_id")}
    return [_without_ids(item) for item in found] if isinstance(found, list) else found


@pytest.mark.parametrize(
    ("route", "field"), [(route, field) for route, (rows, _) in ROUTES.items() for field in rows]
)
def test_a_field_changes_the_answer(service: Service, route: str, field: str):
    rows, _ = ROUTES[route]
    besides, change = rows[field]
    before, text = answer(service, route, besides)
    again, _ = answer(service, route, besides)
    assert again == before, "the same body should give the same answer"
    added = change(text) if callable(change) else change
    assert field in added
    after, _ = answer(service, route, besides | added)
    assert after != before


def test_the_user_is_in_the_log(service: Service):
    answer(service, "chat/completions", {"user": "somebody-4711", "max_tokens": 1})
    assert "somebody-4711" in service.text


def test_the_table_has_every_field():
    assert CHAT.keys() | {"user"} == ChatRequest.model_fields.keys()
    assert RESPONSES.keys() | {"user"} == ResponseRequest.model_fields.keys()
    assert COMPLETIONS.keys() | ELSEWHERE == CompletionRequest.model_fields.keys()


@pytest.mark.parametrize(
    ("route", "field"),
    [
        *(("chat/completions", field) for field in ChatRequest.UNSUPPORTED),
        *(("responses", field) for field in ResponseRequest.UNSUPPORTED),
        *(("completions", field) for field in CompletionRequest.UNSUPPORTED),
    ],
)
def test_what_is_not_supported_is_refused_by_name(service: Service, route: str, field: str):
    found, _ = answer(service, route, {field: {"type": "something"}})
    assert found == field
