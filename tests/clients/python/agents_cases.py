"""OpenAI's Agents SDK against the service, through the Responses API, which is what it speaks by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from agents import (
    Agent,
    ModelBehaviorError,
    ModelSettings,
    OpenAIProvider,
    RunConfig,
    Runner,
    RunResultStreaming,
    function_tool,
)
from weather import Weather

GREEDY = ModelSettings(temperature=0, max_tokens=12)
ROOMY = ModelSettings(temperature=0, max_tokens=100, parallel_tool_calls=False)

CALLING = ROOMY.resolve(ModelSettings(tool_choice="required"))
SILENT = GREEDY.resolve(ModelSettings(tool_choice="none"))


@pytest_asyncio.fixture
async def config(url: str) -> AsyncIterator[RunConfig]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield RunConfig(model_provider=OpenAIProvider(openai_client=client), tracing_disabled=True)


@pytest.fixture
def asked(question: dict[str, Any], image: str) -> list[dict[str, Any]]:
    """The question in this API's form."""
    if question["model"] == "poet":
        return question["messages"]
    picture = {"type": "input_image", "image_url": f"data:image/png;base64,{image}", "detail": "auto"}
    return [{"role": "user", "content": [{"type": "input_text", "text": "hello"}, picture]}]


def agent(question: dict[str, Any], **fields: Any) -> Agent:
    return Agent(name="asker", model=question["model"], **{"model_settings": GREEDY, **fields})


async def test_an_answer(
    config: RunConfig, question: dict[str, Any], asked: list[dict[str, Any]], by_hand: str
) -> None:
    answer = await Runner.run(agent(question), asked, run_config=config)
    assert answer.final_output == by_hand
    [response] = answer.raw_responses
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 0


async def test_a_stream(
    config: RunConfig, question: dict[str, Any], asked: list[dict[str, Any]], by_hand: str
) -> None:
    run = Runner.run_streamed(agent(question), asked, run_config=config)
    pieces: list[str] = []
    with pytest.raises(ModelBehaviorError, match="max_output_tokens"):  # cut off, it is an error to the SDK
        await hear(run, pieces)
    assert "".join(pieces) == by_hand


async def hear(run: RunResultStreaming, pieces: list[str]) -> None:
    """All of the answer's text, as it comes."""
    async for event in run.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            pieces += [event.data.delta]


async def test_a_conversation_goes_on(config: RunConfig, question: dict[str, Any], asked: list[Any]) -> None:
    first = await Runner.run(agent(question), asked, run_config=config)
    more = [*first.to_input_list(), {"role": "user", "content": "hello again"}]
    second = await Runner.run(agent(question), more, run_config=config)
    assert second.raw_responses[0].usage.input_tokens > first.raw_responses[0].usage.total_tokens


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_tool_is_called_and_its_result_is_answered(
    config: RunConfig, question: dict[str, Any], asked: list[Any], streamed: bool
) -> None:
    seen: list[Weather] = []

    @function_tool
    def weather(asked: Weather) -> str:
        """Get the weather of a city."""
        seen.append(asked)
        return f"{asked.days} days of rain in {asked.city}"

    caller = agent(
        question,
        tools=[weather],
        model_settings=CALLING,
        tool_use_behavior="stop_on_first_tool",
    )
    if streamed:
        run = Runner.run_streamed(caller, asked, run_config=config)
        await hear(run, [])
    else:
        run = await Runner.run(caller, asked, run_config=config)
    [given] = seen
    assert run.final_output == f"{given.days} days of rain in {given.city}"
    silent = agent(question, tools=[weather], model_settings=SILENT)
    told = await Runner.run(silent, run.to_input_list(), run_config=config)
    plain = await Runner.run(agent(question), asked, run_config=config)
    assert told.raw_responses[0].usage.input_tokens > plain.raw_responses[0].usage.input_tokens
    assert len(seen) == 1


async def test_an_output_of_a_type(config: RunConfig, question: dict[str, Any], asked: list[Any]) -> None:
    typed = agent(question, model_settings=ROOMY, output_type=Weather)
    whole = await Runner.run(typed, asked, run_config=config)
    assert isinstance(whole.final_output, Weather)
    run = Runner.run_streamed(typed, asked, run_config=config)
    pieces: list[str] = []
    await hear(run, pieces)
    assert run.final_output == whole.final_output == Weather.model_validate_json("".join(pieces))


async def test_an_unknown_model(config: RunConfig) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await Runner.run(agent({"model": "nobody"}), "hello", run_config=config)
    assert caught.value.code == "model_not_found"
