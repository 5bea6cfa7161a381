"""Workers and experts that do as they are told, failures included, and what speaks to a gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from experts.contract import Reading
from server.errors import ApiError, NotFound
from server.worker.messages import (
    EVENT,
    MODELS,
    Delta,
    EngineStats,
    Event,
    Finished,
    GenerateRequest,
    ModelInfo,
    Started,
    Usage,
    read_generate_body,
)

BASE = ModelInfo("base", "base", "base-folder", None, 1_700_000_000, 2048)
TEXT_ADAPTER = ModelInfo("alpaca", "adapter", "alpaca-folder", "base", 1_700_000_001, 2048)
SEEING_ADAPTER = ModelInfo(
    "org/sees", "adapter", "sees-folder", "base", 1_700_000_002, 2048, reads_images=True
)
STATS = EngineStats(
    running=3, waiting=1, kv_blocks_total=100, kv_blocks_used=25, prefix_cache_queries=40,
    prefix_cache_hits=16, preemptions=2, adapters_loaded=2, adapters_hot=1, prompt_slots_used=1, steps=99,
)  # fmt: skip


def story(*texts: str, prompt_tokens: int = 5, finish_reason: str = "stop", cached: int = 0) -> list[Event]:
    deltas = [Delta(text, (100 + i,)) for i, text in enumerate(texts)]
    usage = Usage(prompt_tokens, len(texts), cached)
    return [Started(prompt_tokens), *deltas, Finished(finish_reason, usage)]  # type: ignore[arg-type]


class Died(Exception):
    """Raised inside the scripted worker: its connection breaks."""


@dataclass(eq=False)
class ScriptedWorker:
    """Speaks the worker's protocol. `script` says what happens to a request, event by event."""

    models: list[ModelInfo] = field(default_factory=lambda: [BASE, TEXT_ADAPTER, SEEING_ADAPTER])
    events: list[Event] = field(default_factory=lambda: story("Hello", " world"))
    script: Callable[[GenerateRequest], AsyncGenerator[Event, None]] | None = None
    refusal: ApiError | None = None
    loading_refusal: ApiError | None = None
    is_ready: bool = True
    is_silent: bool = False  # to polls
    stats: EngineStats = STATS
    requests: list[GenerateRequest] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    polls: int = 0

    @property
    def app(self) -> ASGIApp:
        return Starlette(
            routes=[
                Route("/generate", self._generate, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
                Route("/models", self._models),
                Route("/stats", self._stats),
                Route("/adapters", self._load, methods=["POST"]),
                Route("/adapters/{id}", self._unload, methods=["DELETE"]),
                Route("/health/ready", self._ready),
            ],
            exception_handlers={ApiError: _refuse},
        )

    async def _generate(self, request: Request) -> Response:
        body = read_generate_body(await request.body())
        self.requests.append(body)
        if self.refusal:
            raise self.refusal
        events = self.script(body) if self.script else _played(self.events)
        return StreamingResponse(self._lines(events), media_type="application/x-ndjson")

    async def _lines(self, events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield EVENT.dump_json(event) + b"\n"
        except asyncio.CancelledError:
            self.closed.set()
            raise

    async def _models(self, _: Request) -> Response:
        return Response(MODELS.dump_json(self.models), media_type="application/json")

    async def _stats(self, _: Request) -> Response:
        return JSONResponse({name: getattr(self.stats, name) for name in EngineStats.__slots__})

    async def _ready(self, request: Request) -> Response:
        self.polls += 1
        while self.is_silent and not await request.is_disconnected():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return Response(status_code=200 if self.is_ready else 503)

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        prompt = body["prompt"]
        text = prompt.get("text") or " ".join(m["content"] for m in prompt["messages"])
        ids = ([1] if prompt.get("add_special_tokens", True) else []) + [ord(c) for c in text]
        ids += [0 for _ in prompt.get("tools", ())]
        return JSONResponse({"token_ids": ids, "max_model_len": 2048})

    async def _detokenize(self, request: Request) -> Response:
        return JSONResponse({"text": "".join(map(chr, (await request.json())["token_ids"]))})

    async def _load(self, request: Request) -> Response:
        if self.loading_refusal:
            raise self.loading_refusal
        body = await request.json()
        info = ModelInfo(body["id"], "adapter", body["path"], "base", 1_700_000_003, 2048)
        self.models = [*self.models, info]
        return JSONResponse({name: getattr(info, name) for name in ModelInfo.__slots__})

    async def _unload(self, request: Request) -> Response:
        id = request.path_params["id"]
        if id not in [info.id for info in self.models]:
            raise NotFound(f"no adapter {id}")
        self.models = [info for info in self.models if info.id != id]
        return Response(status_code=204)


async def _played(events: list[Event]) -> AsyncGenerator[Event, None]:
    for event in events:
        yield event


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


class ScriptedExpert:
    """An expert that reads as told: a text, an error, or after a while."""

    def __init__(self, name: str, says: str | Exception = "", seconds: float = 0, version: str = "1") -> None:
        self.name = name
        self.version = version
        self.says = says
        self.seconds = seconds
        self.seen: list[bytes] = []
        self.loaded = self.closed = False

    async def load(self) -> None:
        self.loaded = True

    async def refresh(self) -> None:
        pass

    async def read(self, image: bytes) -> Reading:
        self.seen.append(image)
        await asyncio.sleep(self.seconds)
        if isinstance(self.says, Exception):
            raise self.says
        return Reading(self.says)

    async def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def serving(app: ASGIApp, uds: str | None = None, **options: Any) -> AsyncIterator[str]:
    """`app` on a free port of this machine, or on the Unix socket `uds`.

    uvicorn's own steps without its main loop, whose ticks would cost each test a second at the end.
    """
    config = uvicorn.Config(app, port=0, uds=uds, log_config=None, **options)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = 0 if uds else server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"unix:{uds}" if uds else f"{'https' if config.is_ssl else 'http'}://127.0.0.1:{port}"
    finally:
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.shutdown()
        running = list(server.server_state.tasks)
        await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 5)
        await server.lifespan.shutdown()


@dataclass
class Stack:
    """A running gateway: `http` speaks to it, `app` is it."""

    url: str
    app: FastAPI
    http: httpx.AsyncClient

    async def chat(self, text: str = "Hi", **fields: Any) -> httpx.Response:
        body = {"model": "base", "messages": [{"role": "user", "content": text}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def chunks(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any] | str]:
        """A stream's events, parsed; `[DONE]` stays text."""
        body: dict[str, Any] = {"model": "base", "stream": True, **fields}
        if "chat" in path:
            body.setdefault("messages", [{"role": "user", "content": "Hi"}])
        response = await self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        return [event if event == "[DONE]" else json.loads(event) for event in events]


Launch = Callable[..., Awaitable[Stack]]


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 6), color: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def with_load(stats: EngineStats, running: int) -> EngineStats:
    return replace(stats, running=running, waiting=0)


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # the condition is another program's
            await asyncio.sleep(0.01)
