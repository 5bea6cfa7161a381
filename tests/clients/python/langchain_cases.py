"""LangChain's ChatOpenAI against the service."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI


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


def test_an_unknown_model(url: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key="none", model="nobody", max_retries=0)
    with pytest.raises(openai.NotFoundError) as caught:
        chat.invoke([SystemMessage("hello"), HumanMessage("hello")])
    assert caught.value.code == "model_not_found"


def sum_of(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    first, *rest = chunks
    return sum(rest, first)
