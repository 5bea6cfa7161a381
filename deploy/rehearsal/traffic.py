"""A steady load of real requests, and what became of each: the clients' side of a rehearsal."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx

_SIGN = Path(__file__).parents[2] / "docs" / "sign.png"
_PICTURE = f"data:image/png;base64,{base64.b64encode(_SIGN.read_bytes()).decode()}"

PATIENCE_SECONDS = 60.0  # of a client; longer than anything here may take


class Outcome(StrEnum):
    OK = "ok"
    REFUSED = "refused"  # an HTTP status with OpenAI's error body
    CUT = "cut"  # a stream that ended with an error event
    WRONG = "wrong"  # a whole answer, and not the one of before
    LOST = "lost"  # all else: no answer, an answer without an end, an error without a word


@dataclass(frozen=True, slots=True)
class Question:
    """One greedy request. `name` tells it from the others."""

    name: str
    body: dict[str, Any]

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got. `experts` are (name, outcome) of each reading; times are monotonic."""

    outcome: Outcome
    text: str = ""
    experts: tuple[tuple[str, str], ...] = ()
    told: str = ""  # what went wrong
    begun: float = 0.0
    ended: float = 0.0

    @property
    def heard(self) -> tuple[str, ...]:
        """The experts whose readings are in the prompt."""
        return tuple(name for name, outcome in self.experts if outcome == "ok")

    @property
    def lacking(self) -> bool:
        """Whether an expert could not be heard."""
        return any(outcome not in ("ok", "empty") for _, outcome in self.experts)


# The right text by question and by the experts that were heard: without one, another answer is right.
Expected = dict[tuple[str, tuple[str, ...]], str]


def judged(answer: Answer, name: str, expected: Expected) -> Outcome:
    """`WRONG` for a whole answer to the question `name` that differs from the expected one."""
    whole = answer.outcome is Outcome.OK
    return Outcome.WRONG if whole and answer.text != expected[name, answer.heard] else answer.outcome


def questions(models: Sequence[str], experts: Sequence[str], max_tokens: int = 32) -> list[Question]:
    """Texts for every model, streamed and not, and a picture for the first."""
    texts = ("What is the capital of France?", "Name three colours.", "Why is the sky blue?")
    asked: list[Question] = []
    for (i, text), model in itertools.product(enumerate(texts), models):
        body = _greedy(model, text, max_tokens) | {"experts": []}
        asked += [Question(f"{model}/{i}", body), Question(f"{model}/{i}/streamed", body | {"stream": True})]
    if experts:
        parts = [
            {"type": "text", "text": "What does it say?"},
            {"type": "image_url", "image_url": {"url": _PICTURE}},
        ]
        body = _greedy(models[0], parts, max_tokens) | {"experts": list(experts)}
        asked += [Question("picture", body), Question("picture/streamed", body | {"stream": True})]
    return asked


def _greedy(model: str, content: Any, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}


async def ask(http: httpx.AsyncClient, question: Question) -> Answer:
    """Send it and wait for its end. Never raises for what a server may do."""
    begun = time.monotonic()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=question.body) as response:
            if response.status_code != 200:
                answer = _refusal(response.status_code, await response.aread())
            elif question.streamed:
                answer = await _streamed(response)
            else:
                body = json.loads(await response.aread())
                text = body["choices"][0]["message"]["content"] or ""
                answer = Answer(Outcome.OK, text, _experts(body))
    except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError) as error:
        answer = Answer(Outcome.LOST, told=f"{type(error).__name__}: {error}")
    return replace(answer, begun=begun, ended=time.monotonic())


def _refusal(status: int, content: bytes) -> Answer:
    error = json.loads(content)["error"]
    clear = bool(error["message"]) and bool(error["type"])
    return Answer(Outcome.REFUSED if clear else Outcome.LOST, told=f"{status} {error['message']}")


async def _streamed(response: httpx.Response) -> Answer:
    text = ""
    experts: tuple[tuple[str, str], ...] = ()
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return Answer(Outcome.OK, text, experts)
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return Answer(Outcome.CUT, text, experts, event["error"]["message"])
        experts = experts or _experts(event)
        text += event["choices"][0]["delta"].get("content") or ""
    return Answer(Outcome.LOST, text, experts, "the stream ended without an end")


def _experts(body: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((report["name"], report["outcome"]) for report in body.get("experts") or ())


@dataclass
class Load:
    """Clients that ask one question after another, each with a pause; `answers` are judged."""

    http: httpx.AsyncClient
    asked: Sequence[Question]
    expected: Expected
    pause: float = 0.05
    answers: list[Answer] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def from_clients(self, count: int) -> AsyncIterator[None]:
        """`count` clients at work; at the end each gets its last answer."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._client(number, count, stop))
            try:
                yield
            finally:
                stop.set()

    async def _client(self, number: int, count: int, stop: asyncio.Event) -> None:
        turns = itertools.cycle(range(len(self.asked)))
        for turn in itertools.islice(turns, number * len(self.asked) // count, None):
            if stop.is_set():
                return
            question = self.asked[turn]
            answer = await ask(self.http, question)
            self.answers.append(replace(answer, outcome=judged(answer, question.name, self.expected)))
            await asyncio.sleep(self.pause)


async def expected_answers(
    http: httpx.AsyncClient, asked: Sequence[Question], experts: Sequence[str]
) -> Expected:
    """The right answers, from a service that is whole; with pictures for every set of experts."""
    expected: Expected = {}
    for question in asked:
        with_picture = bool(question.body["experts"])
        sizes = range(len(experts) + 1) if with_picture else (0,)
        for names in itertools.chain.from_iterable(itertools.combinations(experts, n) for n in sizes):
            answer = await ask(http, Question(question.name, question.body | {"experts": list(names)}))
            if answer.outcome is not Outcome.OK:
                raise RuntimeError(f"{question.name} cannot be answered by the whole service: {answer.told}")
            expected[question.name, answer.heard] = answer.text  # the same for sets that say the same
    return expected
