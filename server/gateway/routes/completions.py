"""POST /v1/completions"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from server.errors import InvalidRequest
from server.gateway.answers import Choice, LegacyLogprobs, collect, json_answer, usage_body
from server.gateway.keys import Caller
from server.gateway.openapi import Completion, documented
from server.gateway.parsing import json_body
from server.gateway.pipeline import Job
from server.gateway.schemas import CompletionRequest
from server.gateway.state import CallerDep, Gateway, GatewayDep
from server.gateway.streaming import DONE, EventStream, sse
from server.gateway.tasks import all_or_none
from server.worker.messages import (
    Delta,
    DetokenizeRequest,
    Finished,
    GenerateRequest,
    PromptScored,
    Started,
    TextPrompt,
    TokenPrompt,
)

router = APIRouter()


@router.post("/v1/completions", **documented("Plain completion", Completion, CompletionRequest, streams=True))
async def create(
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
    gateway: GatewayDep,
    caller: CallerDep,
) -> Response:
    if body.stream:
        return EventStream(_stream(gateway, body, caller), gateway.settings.stream_ping_seconds)
    job = gateway.pipeline.prepare_completion(body, caller)
    echoes = await _echoes(gateway, job, body)
    choices = await collect(job, gateway.pipeline.run(job, caller))
    return await json_answer(lambda: _completion(job, choices, echoes, body.logprobs is not None))


async def _echoes(gateway: Gateway, job: Job, body: CompletionRequest) -> list[str]:
    """What each choice's text begins with, as far as no `PromptScored` is to tell it."""
    if not body.echo or body.logprobs is not None:
        return [""] * len(job.choices)
    firsts = job.choices[:: job.choices_per_prompt]
    texts = await all_or_none(_prompt_text(gateway, choice) for choice in firsts)
    return [text for text in texts for _ in range(job.choices_per_prompt)]


async def _prompt_text(gateway: Gateway, choice: GenerateRequest) -> str:
    match choice.prompt:
        case TextPrompt(text=text):
            return text
        case TokenPrompt(token_ids=ids):
            try:
                return (await gateway.pool.detokenize(DetokenizeRequest(choice.model, ids))).text
            except InvalidRequest as error:
                error.param = "prompt"  # the worker knows them as `tokens`
                raise
    raise AssertionError("a plain completion has no chat prompt")


def _completion(job: Job, choices: list[Choice], echoes: list[str], with_logprobs: bool) -> dict[str, Any]:
    return {
        **_head(job),
        "choices": [
            _choice(index, echo, choice, with_logprobs)
            for index, (echo, choice) in enumerate(zip(echoes, choices, strict=True))
        ],
        "usage": usage_body(job.usage([choice.usage for choice in choices])),
    }


def _choice(index: int, echo: str, choice: Choice, with_logprobs: bool) -> dict[str, Any]:
    prompt = choice.prompt
    text = (prompt.text if prompt else echo) + choice.text
    tokens = [*(prompt.logprobs if prompt else ()), *choice.logprobs]
    logprobs = LegacyLogprobs().body(tokens) if with_logprobs else None
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


async def _stream(gateway: Gateway, body: CompletionRequest, caller: Caller) -> AsyncGenerator[bytes, None]:
    job = gateway.pipeline.prepare_completion(body, caller)
    echoes = await _echoes(gateway, job, body)
    pieces = _Pieces(job, body)
    usages = {}
    async with aclosing(gateway.pipeline.run(job, caller)) as events:
        async for index, event in events:
            match event:
                case Started():
                    yield pieces.text(index, echoes[index])
                case PromptScored() if event.text or event.logprobs:  # of the whole prompt, which may be long
                    yield await asyncio.to_thread(pieces.text, index, event.text, event)
                case Delta() if event.text or event.logprobs:
                    yield pieces.text(index, event.text, event)
                case Finished():
                    usages[index] = event.usage
                    yield pieces.text(index, "", finish_reason=event.finish_reason)
    if body.include_usage:
        total = job.usage([usages[index] for index in sorted(usages)])
        yield sse({**_head(job), "choices": [], "usage": usage_body(total)})
    yield DONE


class _Pieces:
    """The chunks of one streamed answer."""

    def __init__(self, job: Job, body: CompletionRequest) -> None:
        self._head = _head(job) | ({"usage": None} if body.include_usage else {})
        self._logprobs = [LegacyLogprobs() for _ in job.choices] if body.logprobs is not None else None

    def text(
        self,
        index: int,
        text: str,
        scored: PromptScored | Delta | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        logprobs = self._logprobs[index].body(scored.logprobs) if self._logprobs and scored else None
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return sse({**self._head, "choices": [choice]})


def _head(job: Job) -> dict[str, Any]:
    return {"id": job.id, "object": "text_completion", "created": job.created, "model": job.model}
