"""A first answer of an adapter, by the very engine that would serve it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from server.errors import ApiError
from server.options import load
from server.serving import StartupError
from server.settings import WorkerSettings
from server.worker.build import build_engine
from server.worker.engine import NativeEngine
from server.worker.messages import ChatMessage, ChatPrompt, Delta, GenerateRequest, SamplingParams

_QUESTION = "Hello, who are you?"
_TOKENS = 16
_ID = "adapter-on-trial"


def answer(base: str, adapter: str) -> str:
    """What `adapter`, `PATH[,option=value …]`, says to a greeting on `base`; greedy, at most 16 tokens.

    Raises `ModelError` where it cannot be loaded and `StartupError` where it cannot answer.
    """
    settings = load(WorkerSettings, {"base": base, "adapters": [f"{_ID}={adapter}"]})
    try:
        return asyncio.run(_ask(build_engine(settings)))
    except ApiError as error:
        raise StartupError(f"{adapter} fits {base} and cannot answer: {error.message}") from error


async def _ask(engine: NativeEngine) -> str:
    request = GenerateRequest(
        "trial",
        _ID,
        ChatPrompt((ChatMessage("user", _QUESTION),)),
        SamplingParams(temperature=0, max_tokens=_TOKENS),
    )
    await engine.start()
    try:
        async with aclosing(engine.generate(request)) as events:
            return "".join([event.text async for event in events if isinstance(event, Delta)])
    finally:
        await engine.stop()
