"""What surrounds every route, outermost first. Each is plain ASGI and passes streams on unbuffered.

RequestContext  x-request-id, access log
AnswerHeaders   what every answer tells browsers and caches, and what layers below want told
Cors            as configured
Errors          every failure as OpenAI's error body, or as a stream's last event
Authentication  API keys
Admission       at most so many requests at once; none while draining
Limits          what one key may ask for
Lifetime        a vanished client, a passed deadline or an expired drain ends a request's work
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import ClassVar

from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import (
    ApiError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    ServerFailure,
    Timeout,
    Unauthenticated,
    Unavailable,
    from_wire,
)
from server.gateway.auth import OPEN_PATHS
from server.gateway.limiter import Limiter
from server.gateway.metrics import GatewayMetrics
from server.serving import Drain
from server.telemetry import accepted_id, request_id

log = logging.getLogger(__name__)

_CLIENT_GONE = 499  # in logs and metrics only: nobody is there to receive it
_LAST_WORD_SECONDS = 5.0  # for a stream's error event: a client that reads nothing more is not waited for


class RequestContext:
    """Gives each request its id, taken from the client's `x-request-id` if that is sane."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = accepted_id(Headers(scope=scope))
        trace.get_current_span().set_attribute("request.id", id)
        token = request_id.set(id)
        begun = time.monotonic()
        status = _CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            # A stream's 200 is sent with its first event: what it failed with later is what counts.
            self._note(scope, scope.get("ended_with", status), time.monotonic() - begun)
            request_id.reset(token)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.http_requests.labels(route, str(status)).inc()
        level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO
        fields = {"method": scope["method"], "path": scope["path"][:500], "status": status}
        if "caller" in scope:  # the key's name, never the key
            fields["key"] = scope["caller"].name
        log.log(level, "request", extra={**fields, "seconds": round(seconds, 4)})


class AnswerHeaders:
    """Adds headers to every answer, errors included: fixed ones, and the scope's `answer_headers`.

    While draining, also the word that ends the connection: a client's next request finds another gateway.
    """

    FIXED: ClassVar[dict[str, str]] = {
        "cache-control": "no-store",  # an answer belongs to whoever asked
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told: dict[str, str] = {}
        scope["answer_headers"] = told

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                closing = {"connection": "close"} if self._drain.draining else {}
                MutableHeaders(scope=message).update(self.FIXED | told | closing)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Cors(CORSMiddleware):
    """Starlette's, with our error body for a refused preflight."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        error = InvalidRequest(
            "This origin, method or header is not allowed here (cors_origins).", code="cors"
        )
        headers = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
        return JSONResponse(error.body(), error.status, headers)


class Errors:
    """Turns what is raised below into an answer: a JSON body, or a stream's error event."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            return
        except Exception as caught:
            error = _as_api_error(caught)
            if not begun:
                await _answer(error)(scope, receive, send)
            elif "last_word" in scope:  # a stream's
                scope["ended_with"] = error.status
                await _end_stream(scope["last_word"](error), send)
            else:
                raise


async def _end_stream(event: bytes, send: Send) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORD_SECONDS):
            await send({"type": "http.response.body", "body": event, "more_body": False})


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    log.exception("a request failed", exc_info=error)
    return ServerFailure("The server failed on this request; its log says why, under the request's id.")


def _answer(error: ApiError) -> Response:
    headers = error.headers()
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def refuse_route(request: Request, error: Exception) -> Response:
    """An exception handler: Starlette's own refusals (no such route or method) in our words."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        refusal: ApiError = NotFound(
            f"There is no route {where}. Of OpenAI's API this server has /v1/chat/completions, "
            "/v1/responses (POST alone: none is kept), /v1/completions and /v1/models; GET /openapi.json "
            "lists all of its routes."
        )
    elif error.status_code == 405:
        refusal = MethodNotAllowed(f"{where}: this method is not allowed here.")
    else:
        refusal = from_wire(error.status_code, f"{where}: {error.detail}", "invalid_request_error")
    response = _answer(refusal)
    response.headers.update(error.headers or {})
    return response


class Admission:
    """Lets `limit` POST requests run at once, before their bodies are read; the next is a 429."""

    def __init__(self, app: ASGIApp, limit: int, drain: Drain) -> None:
        self._app = app
        self._limit = limit
        self._drain = drain
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._drain.draining:
            raise Unavailable("The server is shutting down; try again.")
        if self._running >= self._limit:
            raise RateLimited(f"{self._limit} requests run already; try again.")
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1


class Limits:
    """Holds POST requests to the quota of their key."""

    def __init__(self, app: ASGIApp, limiter: Limiter) -> None:
        self._app = app
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        async with self._limiter.admitted(scope["caller"], scope["answer_headers"]):
            await self._app(scope, receive, send)


class Lifetime:
    """Cancels a POST request's work once its client is gone, its time is up or the drain has expired."""

    def __init__(self, app: ASGIApp, seconds: float, drain: Drain) -> None:
        self._app = app
        self._seconds = seconds
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        client = _Client(receive)
        work = asyncio.create_task(_run(self._app, scope, client.receive, send))
        gone = asyncio.create_task(client.gone())
        expired = asyncio.create_task(_wait(self._drain.expired))
        tasks = {work, gone, expired}
        try:
            await asyncio.wait(tasks, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            reason = _why_ended(work, gone, expired)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if work.cancelled() and reason is not None:
            raise reason
        work.result()


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _why_ended(
    work: asyncio.Task[None], gone: asyncio.Task[None], expired: asyncio.Task[None]
) -> Exception | None:
    if work.done():
        return None
    if gone.done():
        return ClientDisconnect()
    if expired.done():
        return Unavailable("The server is shutting down; try again.")
    return Timeout("The request's deadline has passed (request_seconds).")


class _Client:
    """The receiving side of a request: hands on its body, then watches whether the client stays."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._body_read = asyncio.Event()
        self._disconnected = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._disconnected = True
            self._body_read.set()
        elif not message.get("more_body", False):
            self._body_read.set()
        return message

    async def gone(self) -> None:
        """Returns when the client has left. Listens only once the body is read: it is not to be lost here."""
        await self._body_read.wait()
        while not self._disconnected:
            self._disconnected = (await self._receive())["type"] == "http.disconnect"
