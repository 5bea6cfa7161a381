"""The official Python client against a real service: what it makes of every kind of answer."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI
from pydantic import BaseModel, Field
from service import Service, serving

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

TEXT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
END = "2"  # the id of the tiny base's end of text


class Weather(BaseModel):
    """Little enough for random weights to end it, whatever they choose."""

    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=7)


ROOM: dict[str, Any] = {"temperature": 0, "max_tokens": 100}


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(params=["text", "image"])
def question(request: pytest.FixtureRequest, picture: Path) -> dict[str, Any]:
    """Model and messages, with and without an image."""
    if request.param == "text":
        return {"model": "poet", "messages": TEXT}
    return {"model": "sight", "messages": asked_about(picture)}


def asked_about(picture: Path) -> list[Any]:
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    parts = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": url}}]
    return [TEXT[0], {"role": "user", "content": parts}]


def by_hand(service: Service, question: dict[str, Any]) -> str:
    """The answer that plain HTTP gets."""
    answer = service.ask({**question, "temperature": 0, "max_tokens": 12, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_models(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert models.keys() == {"tiny", "poet", "sight"}
    assert client.models.retrieve("sight") == models["sight"]
    assert models["sight"].to_dict()["parent"] == "tiny"


def test_an_answer(service: Service, client: OpenAI, question: dict[str, Any]) -> None:
    answer = client.chat.completions.create(**question, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.model == question["model"]
    assert answer._request_id
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert choice.message.content == by_hand(service, question)
    assert choice.message.tool_calls is None
    assert answer.usage
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_the_image_is_seen(service: Service, picture: Path) -> None:
    blind = by_hand(service, {"model": "sight", "messages": TEXT})
    assert by_hand(service, {"model": "sight", "messages": asked_about(picture)}) != blind


def test_a_stream(service: Service, client: OpenAI, question: dict[str, Any]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    first, *rest, last = client.chat.completions.create(**question, **GREEDY, **options)
    assert first.choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in rest)
    assert {(chunk.id, chunk.created, chunk.model) for chunk in (first, *rest, last)} == {
        (first.id, first.created, question["model"])
    }
    assert [chunk.choices[0].finish_reason for chunk in rest] == [None] * (len(rest) - 1) + ["length"]
    pieces = [chunk.choices[0].delta.content or "" for chunk in rest]
    assert "".join(pieces) == by_hand(service, question)
    assert last.choices == []
    assert last.usage.completion_tokens == 12


def test_the_stream_helper(service: Service, client: OpenAI, question: dict[str, Any]) -> None:
    """`.stream()` puts the answer together itself, and is strict about what the chunks may be."""
    whole = by_hand(service, question)
    # The helper refuses an answer that max_tokens cut off: this one ends by itself after six tokens.
    ending = {"temperature": 0, "logit_bias": {END: 100}, "extra_body": {"min_tokens": 6}}
    with client.chat.completions.stream(**question, **ending) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content
    assert whole.startswith(final.choices[0].message.content)
    assert events[-1].type == "content.done"
    assert events[-1].content == final.choices[0].message.content


async def test_many_at_once(service: Service, async_client: AsyncOpenAI, question: dict[str, Any]) -> None:
    create = async_client.chat.completions.create
    answers = await asyncio.gather(*(create(**question, **GREEDY) for _ in range(4)))
    assert {answer.choices[0].message.content for answer in answers} == {by_hand(service, question)}
    assert len({answer.id for answer in answers}) == 4


async def test_an_async_stream(service: Service, async_client: AsyncOpenAI, question: dict[str, Any]) -> None:
    stream = await async_client.chat.completions.create(**question, **GREEDY, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == by_hand(service, question)


async def test_leaving_a_stream(service: Service, async_client: AsyncOpenAI) -> None:
    long = {**GREEDY, "max_tokens": 300}
    async with await async_client.chat.completions.create(
        model="poet", messages=TEXT, **long, stream=True
    ) as stream:
        await anext(stream)
    question = {"model": "poet", "messages": TEXT}
    answer = await async_client.chat.completions.create(**question, **GREEDY)
    assert answer.choices[0].message.content == by_hand(service, question)


async def test_a_schema_is_kept_to(
    client: OpenAI, async_client: AsyncOpenAI, question: dict[str, Any]
) -> None:
    asked = {**question, **ROOM, "response_format": Weather}
    parsed = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(parsed, Weather)
    assert (await async_client.chat.completions.parse(**asked)).choices[0].message.parsed == parsed
    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_a_tool_is_called(client: OpenAI, question: dict[str, Any]) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    asked = {**question, **ROOM, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    [choice] = client.chat.completions.parse(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**asked) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert streamed.function == call.function


def test_raw_answers(service: Service, client: OpenAI, question: dict[str, Any]) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **question, **GREEDY, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-request-id"] == raw.request_id == "mine-1"
    assert raw.parse().choices[0].message.content == by_hand(service, question)


def test_raw_streams(client: OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model="poet", messages=TEXT, **GREEDY, stream=True
    ) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_choices_and_logprobs(client: OpenAI) -> None:
    request = {"model": "poet", "messages": TEXT, "n": 3, "seed": 7, "logprobs": True, "top_logprobs": 2}
    sampled = {**GREEDY, "temperature": 1}
    answers = [client.chat.completions.create(**request, **sampled) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    for choice in answers[0].choices:
        assert choice.logprobs
        assert len(choice.logprobs.content or ()) == 12
        for token in choice.logprobs.content or ():
            best = [top.logprob for top in token.top_logprobs[:2]]
            assert best == sorted(best, reverse=True)
            assert token.logprob <= best[0]


def test_plain_completions(client: OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "prompt": "The quick brown",
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = client.completions.create(**request, echo=True)
    assert whole.choices[0].text.startswith("The quick brown")
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert whole.choices[0].text == "The quick brown" + "".join(pieces)


def test_the_end_of_text_is_scored_too(client: OpenAI) -> None:
    """lm-eval asks for one token after the prompt and takes the last score for its, whatever it is."""
    answer = client.completions.create(
        model="tiny", prompt="The quick brown", max_tokens=1, echo=True, logprobs=1, logit_bias={END: 100}
    )
    [choice] = answer.choices
    assert (choice.finish_reason, choice.text) == ("stop", "The quick brown")
    assert answer.usage
    assert choice.logprobs
    assert len(choice.logprobs.token_logprobs or ()) == answer.usage.prompt_tokens + 1


@pytest.mark.parametrize(
    ("change", "kind", "code", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 9}, openai.BadRequestError, None, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "context_length_exceeded", None),
        ({"messages": []}, openai.BadRequestError, None, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_errors_of_the_client(
    client: OpenAI,
    change: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str | None,
    param: str | None,
    stream: bool,
) -> None:
    request = {"model": "poet", "messages": TEXT, "max_tokens": 4, **change}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**request, stream=stream)
    assert caught.value.code == code
    assert param is None or caught.value.param == param
    assert caught.value.request_id
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"] in caught.value.message


@pytest.fixture(scope="module")
def narrow(models: Path) -> Iterator[Service]:
    """A service that asks for a key and does one thing at a time."""
    arguments = ("--base", str(models / "tiny"), "--experts", "")
    with serving(*arguments, "--max-concurrent-requests", "1", "--api-key", "a-secret") as service:
        yield service


def test_keys(narrow: Service) -> None:
    with OpenAI(base_url=f"{narrow.url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert client.with_options(api_key="a-secret").models.list().data[0].id == "tiny"


def test_a_full_server_is_tried_again(narrow: Service) -> None:
    """While one stream holds the only place, others get a 429, and the client waits as it is told."""
    held: list[Any] = []
    seen: list[tuple[int, str | None]] = []

    def see(response: Any) -> None:
        seen.append((response.status_code, response.headers.get("retry-after")))
        if held and response.status_code == 429 and len(seen) == 2:
            held.pop().close()

    request: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with (
        DefaultHttpxClient(event_hooks={"response": [see]}) as http,
        OpenAI(base_url=f"{narrow.url}/v1", api_key="a-secret") as holder,
        OpenAI(base_url=f"{narrow.url}/v1", api_key="a-secret", http_client=http) as client,
    ):
        long = {"max_tokens": 450, "extra_body": {"ignore_eos": True}}
        held.append(holder.chat.completions.create(**request, **long, stream=True))
        next(held[0])
        with pytest.raises(openai.RateLimitError):
            client.with_options(max_retries=0).chat.completions.create(**request, max_tokens=2)
        answer = client.chat.completions.create(**request, max_tokens=2)
    assert answer.choices
    assert seen == [(429, "1"), (429, "1"), (200, None)]
