"""LiteLLM against the service, as one of its OpenAI-compatible providers."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from weather import TOOLS, Weather


@pytest.fixture
def request_(url: str, question: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": f"openai/{question['model']}",
        "messages": question["messages"],
        "api_base": url,
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 12,
        "max_retries": 0,
    }


def test_completion(request_: dict[str, Any], question: dict[str, Any], by_hand: str) -> None:
    answer = litellm.completion(**request_)
    assert answer.choices[0].message.content == by_hand
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.model == question["model"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streaming(request_: dict[str, Any], by_hand: str) -> None:
    chunks = list(litellm.completion(**request_, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=request_["messages"])
    assert whole.choices[0].message.content == by_hand
    assert whole.usage.completion_tokens == litellm.completion(**request_).usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]


async def test_acompletion(request_: dict[str, Any], by_hand: str) -> None:
    assert (await litellm.acompletion(**request_)).choices[0].message.content == by_hand


async def test_async_streaming(request_: dict[str, Any], by_hand: str) -> None:
    stream = await litellm.acompletion(**request_, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == by_hand


@pytest.fixture
def roomy(request_: dict[str, Any]) -> dict[str, Any]:
    """With room for a whole call."""
    return {**request_, "max_tokens": 100}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Weather"}}])
def test_a_tool_is_called_and_its_result_answered(roomy: dict[str, Any], choice: Any) -> None:
    asking = {**roomy, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    answer = litellm.completion(**asking)
    message = answer.choices[0].message
    assert (answer.choices[0].finish_reason, message.content) == ("tool_calls", None)
    [call] = message.tool_calls
    assert call.function.name == "Weather"
    Weather.model_validate_json(call.function.arguments)

    chunks = list(litellm.completion(**asking, stream=True))
    [streamed] = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert streamed.function == call.function
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    asking |= {"messages": [*roomy["messages"], message, result], "tool_choice": "none"}
    told = litellm.completion(**asking)
    assert told.choices[0].message.tool_calls is None
    assert told.usage.prompt_tokens > litellm.completion(**roomy).usage.prompt_tokens


async def test_a_schema_is_kept_to(roomy: dict[str, Any]) -> None:
    asking = {**roomy, "response_format": Weather}
    answer = litellm.completion(**asking).choices[0]
    assert answer.finish_reason == "stop"
    Weather.model_validate_json(answer.message.content)
    assert (await litellm.acompletion(**asking)).choices[0].message.content == answer.message.content
    streamed = litellm.stream_chunk_builder(list(litellm.completion(**asking, stream=True)))
    assert streamed.choices[0].message.content == answer.message.content


def test_any_json_object(roomy: dict[str, Any], closing_bias: dict[str, int]) -> None:
    asking = {**roomy, "response_format": {"type": "json_object"}, "logit_bias": closing_bias}
    assert litellm.completion(**asking).choices[0].message.content == "{}"


def test_text_completion(url: str) -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/tiny",
        prompt="The quick brown",
        api_base=url,
        api_key="none",
        max_tokens=4,
        temperature=0,
        echo=True,
    )
    assert answer.choices[0].text.startswith("The quick brown")


@pytest.mark.parametrize("question", ["text"], indirect=True)
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"model": "openai/nobody"}, litellm.NotFoundError),
        ({"max_tokens": 100_000}, litellm.ContextWindowExceededError),
        ({"temperature": 1.5, "top_p": 3}, litellm.BadRequestError),
    ],
)
def test_mistakes(request_: dict[str, Any], change: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        litellm.completion(**{**request_, **change})
    assert type(caught.value) is kind
