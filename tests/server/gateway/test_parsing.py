"""Bodies: every mistake is a 400 that names the field, and no bytes whatever make anything else."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.chat_completion_content_part_image_param import ImageURL

from server.errors import InvalidRequest
from server.gateway.body import Body
from server.gateway.parsing import IgnoredFields, parse
from server.gateway.responses.schemas import ResponseRequest
from server.gateway.schemas import (
    AdapterBody,
    ChatRequest,
    CompletionRequest,
    DetokenizeBody,
    TokenizeBody,
)
from server.worker.messages import ChatPrompt, GenerateRequest, generate_body, read_generate_body

USER = {"role": "user", "content": "Hi"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps(CHAT | fields).encode())


def refused(schema: type[Body], body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(schema, body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def allowed(*tools: dict[str, Any], mode: str = "auto") -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "bishop", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [image({})]}]}, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [image("x")]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "system", "content": [image({"url": "x"})]}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "messages[0].refusal"),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
            "messages[0].function_call",
        ),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 9, "max_completion_tokens": 4}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"experts": "all"}, "experts"),
        ({"experts": [1]}, "experts[0]"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [tool("f"), tool("f")]}, "tools"),
        ({"tools": [tool("f")] * 200}, "tools"),
        ({"tools": [tool("f", parameters={"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f")], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": tool("g")}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": tool("f")}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": allowed(tool("f"), tool("g"))}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": allowed()}, "tool_choice.allowed_tools.tools"),
        (
            {"tools": [tool("f")], "tool_choice": allowed(tool("f"), mode="none")},
            "tool_choice.allowed_tools.mode",
        ),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.allowed_tools",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"modalities": ["audio"]}, "modalities"),
        ({"moderation": {"model": "m", "policy": {"input": {"mode": "block"}}}}, "moderation"),
        (
            {"messages": [{"role": "user", "content": [image({"url": "x", "detail": "huge"})]}]},
            "messages[0].content[0].image_url.detail",
        ),
        ({"best_of": 4}, "best_of"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_field(fields: dict[str, Any], param: str) -> None:
    error = refused(ChatRequest, CHAT | fields)
    assert error.status == 400
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tools": [tool("f"), tool("g")], "tool_choice": allowed(tool("g"))},
        {"tools": [tool("f", parameters={"type": ["object"]})]},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"top_k": -1},
        {"stop": "END"},
        {"user": "Ann", "store": False, "metadata": {"a": "b"}},
        {"temperature": 0, "top_p": 1},
    ],
)
def test_what_asks_for_nothing_special_is_accepted(fields: dict[str, Any]) -> None:
    chat(**fields)


def test_null_is_as_if_it_was_not_there() -> None:
    call = {"id": "1", "type": None, "function": {"name": "f", "arguments": "{}"}}
    chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    item = {"type": None, "role": "user", "content": "Hi"}
    body = parse(ResponseRequest, json.dumps({"model": "base", "input": [item]}).encode())
    assert [said.content for said in body.for_worker()] == ["Hi"]
    parse(AdapterBody, b'{"id": "a", "path": "b", "options": null}')


def test_a_refusal_is_an_assistants_text() -> None:
    said = {"role": "assistant", "content": None, "refusal": "I will not.", "function_call": None}
    [message] = chat(messages=[said]).messages
    assert message.for_worker().content == "I will not."


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_schemas_numbers_are_finite(number: str) -> None:
    schema = {"type": "object", "properties": {"x": {"maximum": "NUMBER"}}}
    for fields, param in (
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            "response_format.json_schema.schema",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
            "tools[0].function.parameters",
        ),
    ):
        raw = json.dumps({"model": "base", "messages": [{"role": "user", "content": "x"}], **fields})
        with pytest.raises(InvalidRequest, match="finite") as caught:
            parse(ChatRequest, raw.replace('"NUMBER"', number).encode())
        assert caught.value.param == param


@pytest.mark.parametrize("top_k", [None, -1, 0, 1, 40])
def test_a_top_p_of_0_leaves_the_likeliest_token(top_k: int | None) -> None:
    sampling = chat(top_p=0, top_k=top_k).sampling({})
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


@pytest.mark.parametrize("detail", get_args(get_type_hints(ImageURL)["detail"]))
def test_every_detail_that_the_stock_client_knows_is_accepted(detail: str) -> None:
    part = image({"url": "https://a.example/b.png", "detail": detail})
    assert chat(messages=[{"role": "user", "content": [part]}]).image_urls


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}}', b"{'a': 1}", b'{"a": "\\ud800"}',
        b"[]", b'"x"', b"5", b"null",
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_said_to_be_none(raw: bytes) -> None:
    assert refused(ChatRequest, raw).code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m"}, "prompt"),
        ({"model": "m", "prompt": []}, "prompt"),
        ({"model": "m", "prompt": [[]]}, "prompt"),
        ({"model": "m", "prompt": [1, "a"]}, "prompt[1]"),
        ({"model": "m", "prompt": [-1]}, "prompt[0]"),
        ({"model": "m", "prompt": {"a": 1}}, "prompt"),
        ({"model": "m", "prompt": "x", "logprobs": 21}, "logprobs"),
        ({"model": "m", "prompt": "x", "logprobs": True}, "logprobs"),
        ({"model": "m", "prompt": "x", "suffix": "y"}, "suffix"),
        ({"model": "m", "prompt": "x", "best_of": 2}, "best_of"),
    ],
)
def test_mistakes_in_plain_completions(body: dict[str, Any], param: str) -> None:
    error = refused(CompletionRequest, body)
    assert error.param is not None
    assert error.param.startswith(param.partition("[")[0])


def test_mistakes_in_the_small_bodies() -> None:
    picture = {"role": "user", "content": [image({"url": "data:,"})]}
    for schema, body, param in (
        (TokenizeBody, {"model": "m"}, "prompt"),
        (TokenizeBody, {"model": "m", "prompt": "x", "messages": [USER]}, "prompt"),
        (TokenizeBody, {"model": "m", "messages": [picture]}, "messages"),
        (DetokenizeBody, {"model": "m", "tokens": [1.5]}, "tokens[0]"),
        (DetokenizeBody, {"model": "m", "tokens": [-1]}, "tokens[0]"),
        (AdapterBody, {"id": "../x", "path": "x"}, "id"),
        (AdapterBody, {"id": "x", "path": "a\x00b"}, "path"),
    ):
        assert refused(schema, body).param == param


def test_unknown_fields_are_ignored_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    fields = IgnoredFields()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            fields.note(chat(frobnicate=1, wobble=[2]))
    assert sorted(record.field for record in caplog.records) == ["frobnicate", "wobble"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for i in range(3000):  # a client cannot fill the log or the memory with names
            fields.note(chat(**{f"x{i}": 1}))
    assert len(caplog.records) < 1001


def test_of_a_long_unknown_field_only_its_beginning_is_remembered() -> None:
    fields = IgnoredFields()
    for i in range(3):
        fields.note(chat(**{"x" * 1_000_000 + str(i): 1}))
    assert fields._seen == {"x" * 100}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted({*ChatRequest.model_fields, *ChatRequest.UNSUPPORTED, "other"}))
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "refusal", "x"])},
    optional={"text": JSON, "image_url": st.fixed_dictionaries({"url": JSON}) | JSON, "refusal": JSON},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"])},
    optional={
        "content": st.text(max_size=5) | st.lists(PART, max_size=3) | JSON,
        "tool_call_id": st.text(max_size=2),
    },
)


@settings(deadline=None, max_examples=50)
@given(st.lists(MESSAGE, max_size=3) | JSON, st.dictionaries(NAMES, JSON, max_size=4))
def test_any_json_is_understood_or_refused(messages: Any, fields: dict[str, Any]) -> None:
    """What is understood can be sent to a worker; what is not is a 400, never another error."""
    raw = json.dumps({"model": "m", "messages": messages} | fields).encode()
    try:
        body = parse(ChatRequest, raw)
    except InvalidRequest as error:
        json.dumps(error.body()).encode()
        return
    prompt = ChatPrompt(tuple(message.for_worker() for message in body.messages))
    request = GenerateRequest("r", body.model, prompt, body.sampling({}))
    assert read_generate_body(b"".join(generate_body(request))) == request


@settings(deadline=None, max_examples=50)
@given(JSON, st.dictionaries(st.sampled_from(sorted(CompletionRequest.model_fields)), JSON, max_size=4))
def test_any_json_is_a_plain_completion_or_refused(prompt: Any, fields: dict[str, Any]) -> None:
    try:
        body = parse(CompletionRequest, json.dumps({"model": "m", "prompt": prompt} | fields).encode())
    except InvalidRequest:
        return
    assert body.prompts
    body.sampling({})


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{}] * 1_000_000},
        {"messages": [{"role": "user", "content": [{}] * 1_000_000}]},
        {"logit_bias": {str(i): "x" for i in range(300_000)}},
        {"stop": [1] * 1_000_000},
        {"experts": [1] * 1_000_000},
    ],
)
def test_a_million_mistakes_cost_no_more_than_one(fields: dict[str, Any]) -> None:
    raw = json.dumps(CHAT | fields).encode()
    begun = time.process_time()
    with pytest.raises(InvalidRequest):
        parse(ChatRequest, raw)
    assert time.process_time() - begun < 1.0


def test_a_million_token_ids_with_a_mistake() -> None:
    raw = json.dumps({"model": "m", "prompt": [*range(1_000_000), "x"]}).encode()
    begun = time.process_time()
    with pytest.raises(InvalidRequest):
        parse(CompletionRequest, raw)
    assert time.process_time() - begun < 1.0


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatRequest, raw)


def test_too_many_stop_strings_are_told_their_limit() -> None:
    assert "at most 4" in refused(ChatRequest, CHAT | {"stop": ["a"] * 5}).message


def test_the_least_tokens_of_a_completion_are_within_its_default() -> None:
    body = {"model": "tiny", "prompt": "Hi", "min_tokens": 17}
    assert refused(CompletionRequest, body).param == "min_tokens"
    assert refused(CompletionRequest, body | {"max_tokens": 16}).param == "min_tokens"
    enough = parse(CompletionRequest, json.dumps(body | {"max_tokens": 17}).encode())
    assert enough.sampling({}).min_tokens == 17
