"""The worker's HTTP routes over an engine; `docs/design.md` lists them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.errors import ApiError, InvalidRequest, ServerFailure, TooLarge, Unavailable, from_wire
from server.metrics import CONTENT_TYPE
from server.serving import Drain
from server.settings import WorkerSettings
from server.tracing import TELEMETRY
from server.worker.adapter_state import AdapterState, RunTimeAdapters
from server.worker.engine_api import Engine
from server.worker.messages import (
    MODELS,
    AdapterGates,
    Detokenized,
    DetokenizeRequest,
    EngineStats,
    LoadAdapterRequest,
    ModelInfo,
    Tokenized,
    TokenizeRequest,
    read_generate_body,
)
from server.worker.metrics import WorkerMetrics
from server.worker.streaming import EventStream
from server.worker.tracing import GenerationTrace

log = logging.getLogger(__name__)

_TOKENIZE: TypeAdapter[TokenizeRequest] = TypeAdapter(TokenizeRequest)
_DETOKENIZE: TypeAdapter[DetokenizeRequest] = TypeAdapter(DetokenizeRequest)
_LOAD_ADAPTER: TypeAdapter[LoadAdapterRequest] = TypeAdapter(LoadAdapterRequest)

_LIFE_SECONDS = 1.0  # how often one looks whether the engine lives

Message = TypeVar("Message")


def create_app(engine: Engine, settings: WorkerSettings, drain: Drain | None = None) -> FastAPI:
    """The worker's app. It starts and stops `engine`; once `drain` is asked it admits nothing new.

    An engine that dies asks for the drain, which has then `failed`.
    """
    drain = drain or Drain()
    adapters = RunTimeAdapters(engine, AdapterState(settings.adapter_state))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await engine.start()
        watching = asyncio.create_task(_end_with(engine, drain))
        try:
            await adapters.start()
            yield
        finally:
            watching.cancel()
            await adapters.stop()
            await engine.stop()

    app = FastAPI(
        title="LLaMA-Adapter worker", lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=TELEMETRY
    )
    _add_error_handlers(app)
    _add_inference_routes(app, engine, drain, settings.max_message_bytes)
    _add_adapter_routes(app, engine, adapters, settings.max_message_bytes)
    _add_watch_routes(app, engine, drain)
    return app


def _add_inference_routes(app: FastAPI, engine: Engine, drain: Drain, max_bytes: int) -> None:
    metrics = WorkerMetrics(engine.models()[0].id, engine.stats)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        body = await _parse(request, read_generate_body, max_bytes)
        _refuse_unready(engine, drain)
        observer, trace = metrics.observe(body.model), GenerationTrace(body)
        return EventStream(engine.generate(body), observer, trace, drain, lambda: engine.stats().steps)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Tokenized:
        return await engine.tokenize(await _parse(request, _TOKENIZE.validate_json, max_bytes))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Detokenized:
        return await engine.detokenize(await _parse(request, _DETOKENIZE.validate_json, max_bytes))

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)


def _add_adapter_routes(app: FastAPI, engine: Engine, adapters: RunTimeAdapters, max_bytes: int) -> None:
    @app.get("/models")
    async def models() -> Response:
        return Response(MODELS.dump_json(engine.models()), media_type="application/json")

    @app.get("/models/{id}/gates")
    async def gates(id: str) -> AdapterGates:
        return await engine.gates(id)

    @app.post("/adapters")
    async def load_adapter(request: Request) -> ModelInfo:
        return await adapters.load(await _parse(request, _LOAD_ADAPTER.validate_json, max_bytes))

    @app.delete("/adapters/{id}", status_code=204)
    async def unload_adapter(id: str) -> None:
        await adapters.unload(id)


def _add_watch_routes(app: FastAPI, engine: Engine, drain: Drain) -> None:
    @app.get("/stats")
    async def stats() -> EngineStats:
        now = engine.stats()
        return dataclasses.replace(
            now, ready=now.ready and engine.healthy and not drain.draining, draining=drain.draining
        )

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        if not engine.healthy:
            raise Unavailable("The engine has stopped; the worker must be restarted.")
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        _refuse_unready(engine, drain)
        return {"status": "ok"}


async def _end_with(engine: Engine, drain: Drain) -> None:
    """Nothing brings a dead engine back but a new process, which whatever keeps this one running starts."""
    while engine.healthy:  # noqa: ASYNC110 - engines have no event
        await asyncio.sleep(_LIFE_SECONDS)
    log.error("the engine has stopped, and so the worker ends")
    drain.failed = True
    drain.ask()


def _refuse_unready(engine: Engine, drain: Drain) -> None:
    if drain.draining:
        raise Unavailable("The worker is shutting down.")
    if not engine.healthy:
        raise Unavailable("The engine has stopped.", retry_after=5)
    if not engine.stats().ready:
        raise Unavailable("The worker is not ready yet.")


async def _parse(request: Request, read: Callable[[bytes], Message], max_bytes: int) -> Message:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise TooLarge(f"The body is over {max_bytes} bytes; send less, or raise max_message_bytes.")
    try:
        return read(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{place or 'body'}: {first['msg']}", param=place or None) from None
    except ValueError as error:
        raise InvalidRequest(f"body: {error}") from None


def _add_error_handlers(app: FastAPI) -> None:
    async def refuse(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return await refuse(request, from_wire(error.status_code, message, "invalid_request_error"))

    async def leave(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # to nobody: the client left in the middle of its body

    async def fail(request: Request, _: Exception) -> Response:
        return await refuse(request, ServerFailure("The worker failed; its log says why."))

    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
        ApiError: refuse,
        ClientDisconnect: leave,
        HTTPException: refuse_route,
        Exception: fail,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
