"""Schemas and tools on the default base, through the whole service, with the stock client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict
from service import Service, serving

pytestmark = [pytest.mark.server, pytest.mark.weights, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving("--kv-cache-mib", "256") as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


class Mood(StrEnum):
    GOOD = "good"
    BAD = "bad"


class Guest(BaseModel):
    name: str
    age: int
    mood: Mood


class Party(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: str
    guests: list[Guest]
    note: str | None


WEATHER = openai.pydantic_function_tool(
    type("get_weather", (BaseModel,), {"__annotations__": {"city": str}}),
    description="Get the current weather of a city",
)
ADD = openai.pydantic_function_tool(
    type("add", (BaseModel,), {"__annotations__": {"a": int, "b": int}}), description="Add two numbers"
)
ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


def test_a_pydantic_model_is_parsed(client: OpenAI):
    text = "Anna is 31 and Bob is 25. They meet in Oslo and feel good. Write it as JSON."
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        response_format=Party,
        temperature=0,
        max_tokens=150,
    )
    party = answer.choices[0].message.parsed
    assert isinstance(party, Party)
    assert party.guests[0].name == "Anna"
    assert party.guests[0].age == 31


def test_a_pydantic_model_is_parsed_from_a_stream_at_a_high_temperature(client: OpenAI):
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a guest."}],
        response_format=Guest,
        temperature=1.5,
        seed=3,
        max_tokens=300,
        extra_body={"top_k": 50},
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Guest)


def test_any_json_object(client: OpenAI):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a red car as JSON with color and doors."}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    choice = answer.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_a_plain_completion_keeps_to_a_schema(client: OpenAI, stream: bool):
    schema = {"name": "guest", "schema": Guest.model_json_schema() | {"additionalProperties": False}}
    prompt = "Anna is 31 years old and feels good. As JSON:"
    asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 60}
    keeping = {"response_format": {"type": "json_schema", "json_schema": schema}}
    answer = client.completions.create(**asked, stream=stream, extra_body=keeping)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    guest = Guest.model_validate_json("".join(choice.text for choice in choices))
    assert guest.age == 31
    assert choices[-1].finish_reason == "stop"
    free = client.completions.create(**asked)
    with pytest.raises(ValueError):
        json.loads(free.choices[0].text)


def test_a_tool_is_called_and_its_result_answered(client: OpenAI):
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 80}
    answer = client.chat.completions.create(
        **asked,
        messages=ASKED,
        tools=[WEATHER, ADD],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees Celsius, sunny"}
    answer = client.chat.completions.create(
        **asked, messages=[*ASKED, choice.message, result], tools=[WEATHER, ADD], tool_choice="none"
    )
    assert "18" in answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_a_named_tool_is_called_in_a_stream(client: OpenAI):
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "What is 17 plus 25?"}],
        tools=[WEATHER, ADD],
        tool_choice={"type": "function", "function": {"name": "add"}},
        temperature=0,
        max_tokens=80,
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert call.function.name == "add"
    arguments = call.function.parsed_arguments
    assert (arguments.a, arguments.b) == (17, 25)


def test_left_to_choose_a_model_may_just_answer(client: OpenAI):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        tools=[WEATHER, ADD],
        temperature=0,
        max_tokens=40,
    )
    choice = answer.choices[0]
    assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)
    assert choice.message.tool_calls or "Paris" in choice.message.content
    assert "<tool_call" not in (choice.message.content or "")


def test_a_strict_schema_that_cannot_be_followed_names_response_format(client: OpenAI):
    items = {"enum": ["red", "blue"]}
    schema = {"type": "array", "items": items, "uniqueItems": True, "maxItems": 2}

    def ask(strict: bool):
        asked = {"name": "x", "schema": schema, "strict": strict}
        return client.chat.completions.create(
            model=MODEL, messages=ASKED, response_format={"type": "json_schema", "json_schema": asked}
        )

    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        ask(strict=True)
    assert caught.value.param == "response_format"
    assert caught.value.code == "invalid_schema"
    colours = json.loads(ask(strict=False).choices[0].message.content)  # followed as far as it is known
    assert set(colours) <= {"red", "blue"}
    assert len(colours) <= 2
