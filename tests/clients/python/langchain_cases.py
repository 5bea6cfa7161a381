"""LangChain's ChatOpenAI against the service."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import (
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from weather import Weather


@pytest.fixture
def chat(url: str, question: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=url,
        api_key="none",
        model=question["model"],
        temperature=0,
        max_tokens=12,
        max_retries=0,
        stream_usage=True,
    )


def test_invoke(chat: ChatOpenAI, question: dict[str, Any], by_hand: str) -> None:
    answer = chat.invoke(question["messages"])
    assert answer.content == by_hand
    assert answer.tool_calls == answer.invalid_tool_calls == []
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == question["model"]
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_stream(chat: ChatOpenAI, question: dict[str, Any], by_hand: str) -> None:
    whole = sum_of(list(chat.stream(question["messages"])))
    assert whole.content == by_hand
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    assert whole.usage_metadata == chat.invoke(question["messages"]).usage_metadata


async def test_astream(chat: ChatOpenAI, question: dict[str, Any], by_hand: str) -> None:
    assert sum_of([chunk async for chunk in chat.astream(question["messages"])]).content == by_hand


async def test_abatch(chat: ChatOpenAI, question: dict[str, Any], by_hand: str) -> None:
    answers = await chat.abatch([question["messages"]] * 3)
    assert [answer.content for answer in answers] == [by_hand] * 3


def test_the_responses_api(url: str, question: dict[str, Any], by_hand: str) -> None:
    chat = ChatOpenAI(
        base_url=url,
        api_key="none",
        model=question["model"],
        temperature=0,
        max_tokens=12,
        use_responses_api=True,
    )
    assert chat.invoke(question["messages"]).text == by_hand
    assert sum_of(list(chat.stream(question["messages"]))).text == by_hand
    calling = chat.model_copy(update={"max_tokens": 100}).bind_tools([weather], tool_choice="weather")
    call = calling.invoke(question["messages"])
    messages = [*convert_to_messages(question["messages"]), call, weather.invoke(call.tool_calls[0])]
    told = chat.bind_tools([weather], tool_choice="none").invoke(messages)
    assert told.tool_calls == []
    plain = chat.invoke(question["messages"])
    assert told.usage_metadata["input_tokens"] > plain.usage_metadata["input_tokens"]


@pytest.mark.parametrize("question", ["image"], indirect=True)
def test_an_image_block_of_its_own_kind(chat: ChatOpenAI, image: str, by_hand: str) -> None:
    """LangChain's own form of an image, which it turns into OpenAI's."""
    blocks = [{"type": "text", "text": "hello"}, {"type": "image", "base64": image, "mime_type": "image/png"}]
    assert chat.invoke([HumanMessage(content_blocks=blocks)]).content == by_hand


@pytest.mark.parametrize("question", ["text"], indirect=True)
def test_logprobs(chat: ChatOpenAI, question: dict[str, Any]) -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(question["messages"])
    tokens = answer.response_metadata["logprobs"]["content"]
    assert len(tokens) == answer.usage_metadata["output_tokens"]
    assert all(token["logprob"] <= token["top_logprobs"][0]["logprob"] for token in tokens)


@tool(args_schema=Weather)
def weather(city: str, days: int) -> str:
    """Get the weather of a city."""
    return f"{days} days of rain in {city}"


@pytest.fixture
def roomy(chat: ChatOpenAI) -> ChatOpenAI:
    """With room for a whole call."""
    return chat.model_copy(update={"max_tokens": 100})


@pytest.mark.parametrize("choice", ["any", "weather"])
def test_a_tool_is_called(roomy: ChatOpenAI, question: dict[str, Any], choice: str) -> None:
    asking = roomy.bind_tools([weather], tool_choice=choice, parallel_tool_calls=False)
    answer = asking.invoke(question["messages"])
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert answer.content == ""
    assert answer.invalid_tool_calls == []
    [call] = answer.tool_calls
    assert (call["name"], call["type"]) == ("weather", "tool_call")
    assert call["id"]
    Weather.model_validate(call["args"])

    streamed = sum_of(list(asking.stream(question["messages"])))
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])]
    assert streamed.response_metadata["finish_reason"] == "tool_calls"


def test_a_result_is_answered(roomy: ChatOpenAI, question: dict[str, Any]) -> None:
    """LangChain's own way: the tool makes a message of the call, and the messages go back."""
    messages = convert_to_messages(question["messages"])
    call = roomy.bind_tools([weather], tool_choice="weather").invoke(messages)
    result = weather.invoke(call.tool_calls[0])
    assert isinstance(result, ToolMessage)
    told = roomy.bind_tools([weather], tool_choice="none").invoke([*messages, call, result])
    assert told.tool_calls == []
    without = roomy.invoke(messages)
    assert told.usage_metadata["input_tokens"] > without.usage_metadata["input_tokens"] + len(result.content)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output(roomy: ChatOpenAI, question: dict[str, Any], method: Any) -> None:
    asking = roomy.with_structured_output(Weather, method=method)
    answer = asking.invoke(question["messages"])
    assert isinstance(answer, Weather)
    assert await asking.ainvoke(question["messages"]) == answer
    *_, last = asking.stream(question["messages"])
    assert last == answer


def test_json_mode(roomy: ChatOpenAI, question: dict[str, Any], closing_bias: dict[str, int]) -> None:
    asking = roomy.bind(logit_bias=closing_bias).bind(response_format={"type": "json_object"})
    assert asking.invoke(question["messages"]).content == "{}"


def test_an_unknown_model(url: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key="none", model="nobody", max_retries=0)
    with pytest.raises(openai.NotFoundError) as caught:
        chat.invoke([SystemMessage("hello"), HumanMessage("hello")])
    assert caught.value.code == "model_not_found"


def sum_of(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    first, *rest = chunks
    return sum(rest, first)
