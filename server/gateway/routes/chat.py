"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from server.gateway.answers import (
    Choice,
    call_body,
    chat_logprobs,
    collect,
    experts_body,
    json_answer,
    new_call_id,
    usage_body,
)
from server.gateway.keys import Caller
from server.gateway.openapi import ChatCompletion, documented
from server.gateway.parsing import json_body
from server.gateway.pipeline import Job, Pipeline
from server.gateway.schemas import ChatRequest
from server.gateway.state import CallerDep, GatewayDep
from server.gateway.streaming import DONE, EventStream, sse
from server.worker.messages import Delta, Finished, Started, ToolCallDelta

router = APIRouter()


@router.post("/v1/chat/completions", **documented("Chat", ChatCompletion, ChatRequest, streams=True))
async def create(
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))], gateway: GatewayDep, caller: CallerDep
) -> Response:
    if body.stream:
        return EventStream(_stream(gateway.pipeline, body, caller), gateway.settings.stream_ping_seconds)
    job = await gateway.pipeline.prepare_chat(body, caller)
    choices = await collect(job, gateway.pipeline.run(job, caller))
    return await json_answer(lambda: _completion(job, choices, bool(body.logprobs)))


def _completion(job: Job, choices: list[Choice], with_logprobs: bool) -> dict[str, Any]:
    return {
        **_head(job, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": chat_logprobs(choice.logprobs) if with_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage_body(job.usage([choice.usage for choice in choices])),
        **experts_body(job),
    }


def _message(choice: Choice) -> dict[str, Any]:
    calls = {"tool_calls": [call.body() for call in choice.calls]} if choice.calls else {}
    content = choice.text or (None if choice.calls else "")
    return {"role": "assistant", "content": content, "refusal": None, **calls}


async def _stream(pipeline: Pipeline, body: ChatRequest, caller: Caller) -> AsyncGenerator[bytes, None]:
    job = await pipeline.prepare_chat(body, caller)
    head = _head(job, "chat.completion.chunk") | ({"usage": None} if body.include_usage else {})
    first = experts_body(job)  # rides on the first chunk alone
    usages = {}
    async with aclosing(pipeline.run(job, caller)) as events:
        async for index, event in events:
            match event:
                case Started():
                    yield sse(
                        {**head, "choices": [_delta(index, {"role": "assistant", "content": ""})], **first}
                    )
                    first = {}
                case Delta():
                    for choice in _pieces(index, event, bool(body.logprobs)):
                        yield sse({**head, "choices": [choice]})
                case Finished():
                    usages[index] = event.usage
                    yield sse({**head, "choices": [_delta(index, {}, event.finish_reason)]})
    if body.include_usage:
        total = job.usage([usages[index] for index in sorted(usages)])
        yield sse({**head, "choices": [], "usage": usage_body(total)})
    yield DONE


def _pieces(index: int, event: Delta, with_logprobs: bool) -> Iterator[dict[str, Any]]:
    """One chunk's choice for the text and one for each piece of a call; log-probabilities on the first."""
    deltas: list[dict[str, Any]] = [{"tool_calls": [_call_piece(piece)]} for piece in event.tool_calls]
    if event.text or (event.logprobs and not deltas):
        deltas.insert(0, {"content": event.text})
    scored = with_logprobs
    for delta in deltas:
        yield _delta(index, delta) | ({"logprobs": chat_logprobs(event.logprobs)} if scored else {})
        scored = False


def _call_piece(piece: ToolCallDelta) -> dict[str, Any]:
    """Id, type and name come once, with a call's first piece."""
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index, **call_body(new_call_id(), piece.name, piece.arguments)}


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
