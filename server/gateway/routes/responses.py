"""POST /v1/responses"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from itertools import count
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from server.errors import ApiError, InvalidRequest
from server.gateway.answers import json_answer
from server.gateway.keys import Caller
from server.gateway.openapi import ResponseObject, documented
from server.gateway.parsing import json_body
from server.gateway.pipeline import Pipeline
from server.gateway.responses.output import Output, Told, response_body
from server.gateway.responses.schemas import CHAT_NAMES, ResponseRequest
from server.gateway.state import CallerDep, GatewayDep
from server.gateway.streaming import EventStream, sse
from server.worker.messages import Delta, Finished, Started

router = APIRouter()

# In a sentence; `messages` is a word of any other, so only where it begins one as the field at fault.
_CHAT_NAME = re.compile(r"^messages(?=: )|\b(?:max_tokens|response_format)\b")


@router.post("/v1/responses", **documented("Response", ResponseObject, ResponseRequest, streams=True))
async def create(
    body: Annotated[ResponseRequest, Depends(json_body(ResponseRequest))],
    gateway: GatewayDep,
    caller: CallerDep,
) -> Response:
    events = _answer(gateway.pipeline, body, caller)
    if body.stream:
        number = count()

        def numbered(told: Told) -> bytes:
            return sse({**told, "sequence_number": next(number)}, told["type"])

        ping_seconds = gateway.settings.stream_ping_seconds
        chunks = _written(numbered, events, body.scores_tokens)
        return EventStream(chunks, ping_seconds, lambda error: numbered(_failure(error)))
    async with aclosing(events):
        async for told in events:
            last = told
    return await json_answer(lambda: last["response"])


async def _written(
    write: Callable[[Told], bytes], events: AsyncGenerator[Told, None], scored: bool
) -> AsyncGenerator[bytes, None]:
    """What repeats all log-probabilities of an answer, where it is `scored`, is written on a thread."""
    async with aclosing(events):
        async for told in events:
            if scored and not told["type"].endswith(".delta"):
                yield await asyncio.to_thread(write, told)
            else:
                yield write(told)


def _failure(error: ApiError) -> Told:
    body = error.body()  # at both places where clients look for it
    return {**body["error"], **body, "type": "error"}


async def _answer(pipeline: Pipeline, body: ResponseRequest, caller: Caller) -> AsyncGenerator[Told, None]:
    """All that a stream tells; the last event has the whole response."""
    output = Output(body.scores_tokens)
    with _own_names():
        job = await pipeline.prepare_chat(body, caller)
        async with aclosing(pipeline.run(job, caller)) as events:
            async for _, event in events:
                match event:
                    case Started():
                        response = response_body(job, body, output)
                        for kind in ("response.created", "response.in_progress"):
                            yield {"type": kind, "response": response}
                    case Delta():
                        for told in output.take(event):
                            yield told
                    case Finished():
                        for told in output.finish(event):
                            yield told
    yield {"type": f"response.{output.status}", "response": response_body(job, body, output)}


@contextmanager
def _own_names() -> Iterator[None]:
    """What a worker finds wrong it calls by chat's name."""
    try:
        yield
    except InvalidRequest as error:
        error.message = _CHAT_NAME.sub(lambda name: CHAT_NAMES[name[0]], error.message)
        error.param = CHAT_NAMES.get(error.param or "", error.param)
        raise
