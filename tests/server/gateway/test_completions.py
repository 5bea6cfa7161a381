"""Plain completions: prompts of every form, echo, log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidRequest
from server.worker.messages import (
    Delta,
    Finished,
    Grammar,
    PromptScored,
    Started,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    TopLogprob,
    Usage,
    score_pieces,
)
from tests.server.gateway.scripted import STATS, Launch, ScriptedWorker, Stack, story, until

PROMPT = PromptScored(
    (
        TokenLogprob(1, "The", None),
        TokenLogprob(2, " sky", -1.5, (TopLogprob(9, " cat", -0.5), TopLogprob(2, " sky", -1.5))),
        TokenLogprob(3, " is", -0.25, (TopLogprob(3, " is", -0.25),)),
    ),
    "The sky is",
)
BLUE = TokenLogprob(4, " blue", -0.75, (TopLogprob(8, " red", -0.7),))


async def complete(gateway: Stack, **fields: Any) -> httpx.Response:
    return await gateway.http.post(
        "/v1/completions", json={"model": "base", "prompt": "The sky is", **fields}
    )


async def test_an_answer(gateway: Stack, worker: ScriptedWorker) -> None:
    body = (await complete(gateway, add_special_tokens=False)).json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "base",
        "choices": [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }
    assert worker.requests[0].prompt == TextPrompt("The sky is", add_special_tokens=False)
    assert worker.requests[0].sampling.max_tokens == 16  # OpenAI's default


async def test_a_response_format(gateway: Stack, worker: ScriptedWorker) -> None:
    schema = {"type": "object", "properties": {"color": {"type": "string"}}}
    named = {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}
    answer = await complete(gateway, response_format=named, prompt=["The sky is", "The cat"], n=2)
    assert answer.status_code == 200, answer.text
    grammars = [request.sampling.grammar for request in worker.requests]
    assert grammars == [Grammar("json_schema", schema, strict=False)] * 4
    for given, grammar in (({"type": "json_object"}, Grammar("json_object")), ({"type": "text"}, None)):
        await complete(gateway, response_format=given)
        assert worker.requests[-1].sampling.grammar == grammar


async def test_a_stream(gateway: Stack) -> None:
    *chunks, usage, done = await gateway.chunks(
        "/v1/completions", prompt="x", stream_options={"include_usage": True}
    )
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello world"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 7)


async def test_token_ids_and_lists_of_prompts(gateway: Stack, worker: ScriptedWorker) -> None:
    for prompt, expected in (
        ([5, 6], [TokenPrompt((5, 6))]),
        ([[5, 6], [7]], [TokenPrompt((5, 6)), TokenPrompt((7,))]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ("", [TextPrompt("")]),
    ):
        worker.requests.clear()
        response = await complete(gateway, prompt=prompt)
        assert response.status_code == 200, response.text
        by_index = sorted(worker.requests, key=lambda request: int(request.request_id.rpartition("-")[2]))
        assert [request.prompt for request in by_index] == expected


async def test_choices_of_prompts_are_numbered_prompt_by_prompt(
    gateway: Stack, worker: ScriptedWorker
) -> None:
    async def script(request):
        for event in story(f"<{request.prompt.text}{request.sampling.seed}>", prompt_tokens=3):
            yield event

    worker.script = script
    body = (await complete(gateway, prompt=["a", "b"], n=2, seed=1)).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "<a1>"),
        (1, "<a2>"),
        (2, "<b1>"),
        (3, "<b2>"),
    ]
    # Each prompt counts once, each completion for itself.
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10}


async def test_what_empty_queues_could_not_hold_is_a_mistake(launch: Launch) -> None:
    workers = [ScriptedWorker(stats=replace(STATS, max_requests=3)) for _ in range(2)]
    gateway = await launch(*workers)
    response = await complete(gateway, prompt=["a", "b", "c"], n=2)
    assert response.status_code == 200, response.text
    for fields, param in (({"prompt": ["a"] * 7}, "prompt"), ({"prompt": "a", "n": 7}, "n")):
        response = await complete(gateway, **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert "the 6 that" in response.json()["error"]["message"]
    workers[1].stats = STATS  # which tells no limit
    polls = workers[1].polls
    await until(lambda: workers[1].polls >= polls + 2)
    assert (await complete(gateway, prompt=["a"] * 7)).status_code == 200


async def test_echo_without_logprobs(gateway: Stack, worker: ScriptedWorker) -> None:
    assert (await complete(gateway, echo=True)).json()["choices"][0]["text"] == "The sky isHello world"
    body = (await complete(gateway, echo=True, prompt=[72, 105])).json()
    assert body["choices"][0]["text"] == "HiHello world"
    chunks = await gateway.chunks("/v1/completions", prompt="P", echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "PHello world"


async def test_echo_asks_once_for_each_prompt_and_calls_it_so(launch: Launch) -> None:
    asked: list[list[int]] = []

    class Counting(ScriptedWorker):
        async def _detokenize(self, request: Request) -> Response:
            asked.append((await request.json())["token_ids"])
            if 9 in asked[-1]:
                raise InvalidRequest("9 is no token", param="tokens")
            return await super()._detokenize(request)

    gateway = await launch(Counting())
    body = (await complete(gateway, echo=True, prompt=[[72], [105]], n=3)).json()
    assert [choice["text"] for choice in body["choices"]] == ["HHello world"] * 3 + ["iHello world"] * 3
    assert asked == [[72], [105]]
    refused = await complete(gateway, echo=True, prompt=[9], max_tokens=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


async def test_choices_that_are_large_together_are_refused(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, max_body_bytes=10_000)
    for many, field in (({"n": 3}, "n"), ({"prompt": ["x"] * 3}, "prompt")):
        refused = await complete(gateway, **{"stop": ["s" * 4000], **many})
        assert (refused.status_code, refused.json()["error"]["param"]) == (413, field)
    refused = await complete(gateway, prompt="p" * 4000, n=3)
    assert refused.status_code == 413
    assert "max_body_bytes" in refused.json()["error"]["message"]
    assert worker.requests == []
    assert (await complete(gateway, prompt="p" * 4000, n=2)).status_code == 200
    long_stop = await complete(gateway, stop="s" * 5000)
    assert (long_stop.status_code, long_stop.json()["error"]["param"]) == (400, "stop")


async def test_echo_with_logprobs_scores_the_prompt(gateway: Stack, worker: ScriptedWorker) -> None:
    """What lm-eval's loglikelihood requests need: one entry per token of prompt and completion."""
    worker.events = [Started(3), PROMPT, Delta(" blue", (4,), (BLUE,)), Finished("length", Usage(3, 1))]
    response = await complete(gateway, prompt=[1, 2, 3], echo=True, logprobs=2, max_tokens=1, temperature=0)
    sampling = worker.requests[0].sampling
    assert (sampling.prompt_logprobs, sampling.logprobs, sampling.max_tokens) == (2, 2, 1)
    choice = response.json()["choices"][0]
    assert choice["text"] == "The sky is blue"
    assert choice["logprobs"] == {
        "tokens": ["The", " sky", " is", " blue"],
        "token_logprobs": [None, -1.5, -0.25, -0.75],
        "top_logprobs": [
            None,
            {" cat": -0.5, " sky": -1.5},
            {" is": -0.25},
            {" red": -0.7, " blue": -0.75},
        ],
        "text_offset": [0, 3, 7, 10],
    }
    chunks = await gateway.chunks("/v1/completions", prompt="x", echo=True, logprobs=2, max_tokens=1)
    scored = [c["choices"][0]["logprobs"] for c in chunks[:-1] if c["choices"][0]["logprobs"]]
    assert [piece["text_offset"] for piece in scored] == [[0, 3, 7], [10]]
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "The sky is blue"


async def test_scores_in_pieces_are_answered_as_those_in_one(
    gateway: Stack, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.messages.SCORES", 2)
    pieces = list(score_pieces(PROMPT.logprobs, PROMPT.text))
    assert [len(piece.logprobs) for piece in pieces] == [2, 1]
    fields = {"echo": True, "logprobs": 2, "max_tokens": 1}
    answers = []
    for scored in ([PROMPT], pieces):
        worker.events = [Started(3), *scored, Delta(" blue", (4,), (BLUE,)), Finished("length", Usage(3, 1))]
        whole = (await complete(gateway, **fields)).json()
        chunks = await gateway.chunks("/v1/completions", prompt="x", **fields)
        answers.append((whole["choices"], [chunk["choices"] for chunk in chunks[:-1]]))
    assert answers[0] == answers[1]


async def test_scoring_alone(gateway: Stack, worker: ScriptedWorker) -> None:
    worker.events = [Started(3), PROMPT, Finished("length", Usage(3, 0))]
    choice = (await complete(gateway, echo=True, logprobs=0, max_tokens=0)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("The sky is", "length")
    assert worker.requests[0].sampling.max_tokens == 0
    refused = await complete(gateway, max_tokens=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


async def test_too_many_prompts(gateway: Stack, worker: ScriptedWorker) -> None:
    response = await complete(gateway, prompt=["x"] * 129)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert worker.requests == []
