"""One worker over HTTP; `docs/design.md` lists its routes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from server.errors import ApiError, ServerFailure, Timeout, Unavailable, from_wire
from server.telemetry import outgoing_headers
from server.worker.messages import (
    EVENT,
    MODELS,
    AdapterGates,
    Detokenized,
    DetokenizeRequest,
    EngineStats,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    LoadAdapterRequest,
    ModelInfo,
    PromptScored,
    Tokenized,
    TokenizeRequest,
    generate_body,
    join_scores,
)

_JSON = {"content-type": "application/json"}
_WRITE_SECONDS = 30.0
_ADMIN_SECONDS = 120.0  # an adapter is read from a disk, and may be large

_STATS: TypeAdapter[EngineStats] = TypeAdapter(EngineStats)
_MODEL: TypeAdapter[ModelInfo] = TypeAdapter(ModelInfo)
_GATES: TypeAdapter[AdapterGates] = TypeAdapter(AdapterGates)
_TOKENIZE: TypeAdapter[TokenizeRequest] = TypeAdapter(TokenizeRequest)
_TOKENIZED: TypeAdapter[Tokenized] = TypeAdapter(Tokenized)
_DETOKENIZE: TypeAdapter[DetokenizeRequest] = TypeAdapter(DetokenizeRequest)
_DETOKENIZED: TypeAdapter[Detokenized] = TypeAdapter(Detokenized)
_LOAD_ADAPTER: TypeAdapter[LoadAdapterRequest] = TypeAdapter(LoadAdapterRequest)

Message = TypeVar("Message")


class Unreachable(Unavailable):
    """The worker cannot be reached, or broke off before its answer was complete."""


class BrokeOff(Unreachable):
    """The worker was lost with the request in its hands."""


class WorkerClient:
    """Speaks to the worker at `url`, which is `http://host:port` or `unix:/path`.

    Every method raises `ApiError`: the worker's own, `Unreachable`, or `Timeout` where it goes silent
    for `read_seconds`.
    """

    def __init__(self, url: str, connect_seconds: float, read_seconds: float) -> None:
        self.url = url
        self._timeout = httpx.Timeout(
            connect=connect_seconds, read=read_seconds, write=_WRITE_SECONDS, pool=connect_seconds
        )
        uds = url.removeprefix("unix:") if url.startswith("unix:") else None
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(
            base_url="http://worker" if uds else url,
            transport=httpx.AsyncHTTPTransport(uds=uds, limits=limits),
            timeout=self._timeout,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The request's events up to `Finished`; `Failed` is raised. Closing it aborts the request.

        A prompt's log-probabilities are one event here, however many pieces they came in.
        """
        finished = False
        scores: list[PromptScored] = []
        try:
            async with self._stream(request) as response:
                if response.status_code != 200:
                    raise _error(response, await response.aread())
                # Read to the end even after `Finished`: only then can the connection serve again.
                async for line in _lines(response):
                    event = EVENT.validate_json(line)
                    _raise_if_failed(event)
                    finished = finished or isinstance(event, Finished)
                    if isinstance(event, PromptScored):
                        scores.append(event)
                        if event.more:
                            continue
                        event = join_scores(scores)
                    yield event
        except httpx.HTTPError as error:
            if not finished:
                raise _unreachable(error) from error
        except ValidationError as error:
            raise ServerFailure("A worker sent an event that cannot be understood.") from error
        if not finished:
            raise BrokeOff("A worker broke off before the answer was complete; try again.")

    async def ready(self, seconds: float) -> bool:
        """Whether the worker takes requests now. Raises `Unreachable` or `Timeout` where it does not say."""
        try:
            response = await self._http.get("/health/ready", timeout=seconds)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        return response.status_code == 200

    async def models(self, seconds: float) -> list[ModelInfo]:
        return await self._ask("GET", "/models", MODELS, seconds=seconds)

    async def stats(self, seconds: float) -> EngineStats:
        return await self._ask("GET", "/stats", _STATS, seconds=seconds)

    async def gates(self, id: str) -> AdapterGates:
        return await self._ask("GET", f"/models/{quote(id, safe='')}/gates", _GATES)

    async def tokenize(self, request: TokenizeRequest) -> Tokenized:
        return await self._ask("POST", "/tokenize", _TOKENIZED, _TOKENIZE.dump_json(request))

    async def detokenize(self, request: DetokenizeRequest) -> Detokenized:
        return await self._ask("POST", "/detokenize", _DETOKENIZED, _DETOKENIZE.dump_json(request))

    async def load_adapter(self, request: LoadAdapterRequest) -> ModelInfo:
        body = _LOAD_ADAPTER.dump_json(request)
        return await self._ask("POST", "/adapters", _MODEL, body, seconds=_ADMIN_SECONDS)

    async def unload_adapter(self, id: str, seconds: float) -> None:
        """Returns when no request uses it any more; `seconds` is how long one may run."""
        await self._send("DELETE", f"/adapters/{quote(id, safe='')}", None, seconds + _ADMIN_SECONDS)

    def _stream(self, request: GenerateRequest) -> AbstractAsyncContextManager[httpx.Response]:
        return self._http.stream("POST", "/generate", content=_pieces(request), headers=outgoing_headers())

    async def _ask(
        self,
        method: str,
        path: str,
        answer: TypeAdapter[Message],
        body: bytes | None = None,
        seconds: float | None = None,
    ) -> Message:
        response = await self._send(method, path, body, seconds)
        try:
            return answer.validate_json(response.content)
        except ValidationError as error:
            raise ServerFailure("A worker sent an answer that cannot be understood.") from error

    async def _send(
        self, method: str, path: str, body: bytes | None, seconds: float | None
    ) -> httpx.Response:
        timeout = self._timeout if seconds is None else httpx.Timeout(seconds)
        headers = outgoing_headers() | (_JSON if body is not None else {})
        try:
            response = await self._http.request(method, path, content=body, headers=headers, timeout=timeout)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        if response.status_code >= 300:
            raise _error(response, response.content)
        return response


def _raise_if_failed(event: Event) -> None:
    if isinstance(event, Failed):
        raise from_wire(event.status, event.message, event.error_type, event.code, event.param)
    if isinstance(event, Finished) and event.finish_reason == "abort":
        raise Unavailable("The worker aborted the request; try again.")


async def _pieces(request: GenerateRequest) -> AsyncIterator[bytes]:
    for piece in generate_body(request):
        yield piece


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """What is in the lines that have something in them.

    Split at newlines alone; httpx's own lines would split at U+2028 inside a text too.
    """
    parts: list[bytes] = []  # of a line, joined once: what is long comes in many pieces
    async for piece in response.aiter_bytes():
        end, *lines = piece.split(b"\n")
        parts.append(end)
        for begin in lines:
            if line := b"".join(parts):
                yield line
            parts = [begin]


def _unreachable(error: httpx.HTTPError) -> ApiError:
    if isinstance(error, httpx.ReadTimeout):
        return Timeout("The worker went silent; try again.")
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)):
        return Unreachable("The worker cannot be reached; try again.")
    return BrokeOff("The worker broke off; try again.")


def _error(response: httpx.Response, content: bytes) -> ApiError:
    """The worker's error body as the error it describes."""
    retry_after = response.headers.get("retry-after", "")
    try:
        fields: dict[str, Any] = json.loads(content)["error"]
        error = from_wire(
            response.status_code, fields["message"], fields["type"], fields.get("code"), fields.get("param")
        )
    except (ValueError, KeyError, TypeError):
        error = ServerFailure(f"A worker answered with status {response.status_code} and no reason.")
    error.retry_after = float(retry_after) if retry_after.isdecimal() else error.retry_after
    return error
