"""The experts' service: one factory for any set of them (routes: docs/design.md; errors: OpenAI's shape)."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from experts.contract import BadImage, Expert, ExpertError, ExpertResult, Reading

_LOG = logging.getLogger(__name__)
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60)


def create_app(
    experts: Sequence[Expert],
    *,
    max_image_bytes: int = 20 * 1024 * 1024,
    max_waiting: int = 32,
    telemetry: TelemetryConfig | None = None,
) -> FastAPI:
    """A service of these experts, which it loads when it starts and closes when it ends.

    `max_waiting` requests may be under way per expert; over it they are refused with 429. `telemetry`: what
    FastAPI is to trace, where the process has an OpenTelemetry provider.
    """
    service = _Service(experts, max_image_bytes, max_waiting)
    app = FastAPI(
        title="LLaMA-Adapter experts",
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        telemetry=telemetry,
    )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _our_bug)
    app.add_api_route("/experts", service.list_experts, methods=["GET"])
    app.add_api_route("/experts/{name}/read", service.read, methods=["POST"], response_model=None)
    app.add_api_route("/health/live", _live, methods=["GET"])
    app.add_api_route("/health/ready", service.readiness, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", service.metrics, methods=["GET"], response_model=None)
    return app


class _Service:
    def __init__(self, experts: Sequence[Expert], max_image_bytes: int, max_waiting: int) -> None:
        self._experts = {expert.name: expert for expert in experts}
        self._max_image_bytes = max_image_bytes
        self._max_waiting = max_waiting
        self._waiting: Counter[str] = Counter()
        self._ready = False
        self._registry = CollectorRegistry()
        self._latency = Histogram(
            "llama_adapter:expert_latency_seconds",
            "Time from an image's last byte to its reading; outcome: ok, empty, bad_image or failed",
            ("expert", "outcome"),
            buckets=_BUCKETS,
            registry=self._registry,
        )

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for expert in self._experts.values():
                stack.push_async_callback(expert.close)
                await expert.load()
            self._ready = True
            yield
            self._ready = False

    async def list_experts(self) -> list[dict[str, str]]:
        return [{"name": e.name, "version": e.version} for e in self._experts.values()]

    async def readiness(self) -> Response:
        if self._ready:
            return JSONResponse({"status": "ready"})
        return _error(503, "The experts are not loaded yet.", "unavailable", {"Retry-After": "1"})

    async def metrics(self) -> Response:
        return PlainTextResponse(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def read(self, name: str, request: Request) -> Response:
        """One image file as the body → `ExpertResult`."""
        expert = self._experts.get(name)
        if expert is None:
            known = ", ".join(self._experts) or "none"
            return _error(404, f"No expert is called {name!r}; here are: {known}.", "expert_not_found")
        if not self._ready:
            return await self.readiness()
        if self._waiting[name] >= self._max_waiting:
            message = f"The expert {name!r} has {self._max_waiting} images waiting; try again later."
            return _error(429, message, "rate_limit_exceeded", {"Retry-After": "1"})
        self._waiting[name] += 1
        try:
            image = await _body(request, self._max_image_bytes)
            return await self._answer(expert, image, request)
        except ClientDisconnect:
            return Response(status_code=499)  # to nobody
        finally:
            self._waiting[name] -= 1

    async def _answer(self, expert: Expert, image: bytes, request: Request) -> Response:
        start = time.perf_counter()
        outcome = "failed"
        try:
            reading = await _unless_disconnected(expert, image, request)
            outcome = "ok" if reading.text else "empty"
        except BadImage as error:
            outcome = "bad_image"
            return _error(400, str(error), "invalid_image")
        except ExpertError as error:
            _LOG.exception("expert %s failed", expert.name)
            return _error(502, str(error), "expert_failed")
        finally:
            seconds = time.perf_counter() - start
            self._latency.labels(expert.name, outcome).observe(seconds)
        result = ExpertResult(expert.name, expert.version, reading.text, reading.confidence, seconds)
        return JSONResponse(dataclasses.asdict(result))


async def _live() -> dict[str, str]:
    return {"status": "live"}


async def _body(request: Request, limit: int) -> bytes:
    """The request's body; a longer one is refused as soon as it passes the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"The image is larger than {limit} bytes, which is the limit here.")
    return bytes(body)


async def _unless_disconnected(expert: Expert, image: bytes, request: Request) -> Reading:
    """Read, but let go as soon as nobody waits: whoever asked may long have passed its deadline."""
    reading = asyncio.ensure_future(expert.read(image))
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ClientDisconnect
        return reading.result()
    finally:
        reading.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
    return _error(error.status_code, str(error.detail), codes.get(error.status_code), error.headers)


async def _our_bug(_request: Request, _error_: Exception) -> Response:
    return _error(500, "The expert service failed; its log has the reason.", "internal_error")


def _error(status: int, message: str, code: str | None, headers: Any = None) -> Response:
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)
