"""Captions by the worker: a LLaMA-Adapter that tells what an image shows (LLaMA-Adapter V2, section 4.4)."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from experts.caption import CaptionExpert
from experts.contract import Busy, ExpertError, Reading
from server.errors import ApiError, RateLimited
from server.gateway.clients.pool import WorkerPool
from server.worker.messages import (
    ChatMessage,
    ChatPrompt,
    Delta,
    Event,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
)

CAPTION_ADAPTER = "caption"  # an adapter served under this id is offered as an expert

_MAX_TOKENS = 64


def caption_generator(
    model_of: Callable[[str], ModelInfo],
    events_of: Callable[[GenerateRequest], AsyncGenerator[Event, None]],
) -> Callable[[bytes, str], Awaitable[Reading]]:
    """`generate(image, prompt)`: the caption adapter's greedy answer, whole.

    Its confidence is the geometric mean of its tokens' probabilities. It raises `ExpertError`, and where
    the workers' queues are full `Busy`.
    """

    async def generate(image: bytes, prompt: str) -> Reading:
        try:
            if not model_of(CAPTION_ADAPTER).reads_images:
                raise ExpertError(f"the adapter {CAPTION_ADAPTER!r} reads no images; serve one that does")
            async with aclosing(events_of(_request(image, prompt))) as stream:
                events = [event async for event in stream]
        except ApiError as error:
            kind = Busy if isinstance(error, RateLimited) else ExpertError
            raise kind(f"the worker gave no caption: {error.message}") from error
        deltas = [event for event in events if isinstance(event, Delta)]
        logprobs = [token.logprob or 0.0 for delta in deltas for token in delta.logprobs]
        confidence = math.exp(sum(logprobs) / len(logprobs)) if logprobs else None
        return Reading("".join(delta.text for delta in deltas), confidence)

    return generate


def caption_expert(pool: WorkerPool, min_confidence: float) -> CaptionExpert:
    """The expert that asks the caption adapter of `pool`'s workers."""
    generate = caption_generator(pool.model, pool.generate)
    return CaptionExpert(generate, caption_version(pool.holdings), min_confidence)


def caption_version(holdings_of: Callable[[str], Sequence[ModelInfo]]) -> Callable[[], str]:
    """`version()`: another one whenever a worker loads the caption adapter, under whatever version."""

    def version() -> str:
        return " ".join(sorted(f"{info.version}@{info.created}" for info in holdings_of(CAPTION_ADAPTER)))

    return version


def _request(image: bytes, prompt: str) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"caption-{uuid.uuid4().hex}",
        model=CAPTION_ADAPTER,
        prompt=ChatPrompt((ChatMessage("user", prompt),)),
        sampling=SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, logprobs=0),
        images=(image,),
    )
