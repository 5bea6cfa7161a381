"""What the answers of chat and plain completions have in common."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from server.gateway.pipeline import Job
from server.worker.messages import (
    Delta,
    Event,
    Finished,
    PromptScored,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Usage,
)


@dataclass(slots=True)
class Call:
    """One call of a tool, put together."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        return call_body(self.id, self.name, "".join(self.arguments))


@dataclass(slots=True)
class Choice:
    """One choice's events, put together."""

    texts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: PromptScored | None = None
    finish_reason: str | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0))

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def take_calls(self, pieces: Sequence[ToolCallDelta]) -> None:
        for piece in pieces:
            if piece.name is not None:
                self.calls.append(Call(new_call_id(), piece.name))
            self.calls[piece.index].arguments.append(piece.arguments)


async def collect(job: Job, events: AsyncGenerator[tuple[int, Event], None]) -> list[Choice]:
    """Every choice of `job`, complete. Closes `events`."""
    choices = [Choice() for _ in job.choices]
    async with aclosing(events):
        async for index, event in events:
            choice = choices[index]
            match event:
                case PromptScored():
                    choice.prompt = event
                case Delta():
                    choice.texts.append(event.text)
                    choice.logprobs += event.logprobs
                    choice.take_calls(event.tool_calls)
                case Finished():
                    choice.finish_reason, choice.usage = event.finish_reason, event.usage
    return choices


async def json_answer(make: Callable[[], dict[str, Any]]) -> Response:
    """What `make` returns, made on a thread: the log-probabilities of eight long choices take over a second,
    and json as long again without letting anybody else run.
    """
    body = await asyncio.to_thread(lambda: to_json(make()))
    return Response(body, media_type="application/json")


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def call_body(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def usage_body(usage: Usage) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens:
        body["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return body


def experts_body(job: Job) -> dict[str, Any]:
    """What experts had to say, where there was something to ask them."""
    return {} if job.reports is None else {"experts": [report.wire() for report in job.reports]}


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    return {"content": scored_tokens(tokens), "refusal": None}


def scored_tokens(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Each token with its log-probability, and those that were as likely."""
    return [{**_scored(token), "top_logprobs": [_scored(top) for top in token.top]} for token in tokens]


def _scored(token: TokenLogprob | TopLogprob) -> dict[str, Any]:
    raw = list(token.token.encode()) if token.raw is None else token.raw
    return {"token": token.token, "logprob": token.logprob, "bytes": raw}


class LegacyLogprobs:
    """The `logprobs` of a plain completion; keeps count of `text_offset` from one piece to the next."""

    def __init__(self) -> None:
        self._offset = 0

    def body(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.token)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": offsets,
        }


def _alternatives(token: TokenLogprob) -> dict[str, float] | None:
    """Token → log-probability, the chosen one always among them; None for a prompt's first token."""
    if token.logprob is None:
        return None
    best: dict[str, float] = {}
    for top in token.top:  # different ids may have the same text: the likelier one speaks for it
        best[top.token] = max(top.logprob, best.get(top.token, top.logprob))
    best.setdefault(token.token, token.logprob)
    return best
