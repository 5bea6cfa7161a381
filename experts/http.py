"""An expert that runs elsewhere, behind the routes of `experts.app`. Free of torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from pydantic import FailFast, TypeAdapter, ValidationError

from experts.contract import BadImage, Busy, ExpertError, ExpertResult, Reading

# Whoever asks sets a deadline of its own; these only keep a dead peer from holding a connection.
TIMEOUT = httpx.Timeout(connect=2.0, read=120.0, write=10.0, pool=5.0)

_LIST_SECONDS = 5.0  # for the whole of GET /experts: readings wait for the first one
_MAX_ANSWER_BYTES = 2**20  # far more than any reading; what is longer would stall the loop that parses it
_MAX_MESSAGE = 500  # characters of a service's refusal that are passed on

# Not `json.loads`, which answers a deep nesting with a RecursionError.
_RESULT = TypeAdapter(ExpertResult)
_LIST = TypeAdapter(Annotated[list[dict[str, Any]], FailFast()])
_REFUSAL: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_UNKNOWN = "unknown"


class HttpExpert:
    """An `Expert` at `http://host:port` or `unix:/path`.

    `version` is what the service said last; "unknown" until it has been reached once. `headers` are sent
    along with each image, such as the id of the request that it is read for.
    """

    def __init__(
        self,
        name: str,
        url: str,
        timeout: httpx.Timeout = TIMEOUT,
        headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.name = name
        self.version = _UNKNOWN
        self._url = url
        self._timeout = timeout
        self._headers = headers
        self._client: httpx.AsyncClient | None = None

    async def load(self) -> None:
        """Ask for the version. A service that does not tell it is no error: it may yet, with a reading."""
        socket = self._url.removeprefix("unix:") if self._url.startswith("unix:") else None
        self._client = httpx.AsyncClient(
            base_url="http://expert" if socket else self._url,
            transport=httpx.AsyncHTTPTransport(uds=socket),
            timeout=self._timeout,
            headers={"accept-encoding": "identity"},  # a packed answer has no size until it is unpacked
        )
        with suppress(ExpertError):
            await self.refresh()

    async def refresh(self) -> None:
        """Ask for the version, within seconds. Where it is not told it stays. Raises `ExpertError`."""
        try:
            async with asyncio.timeout(_LIST_SECONDS):
                status, body = await self._ask("GET", "/experts")
            if status != httpx.codes.OK:
                raise self._refusal(status, body)
            listed = _LIST.validate_json(body)
            self.version = next(str(e["version"]) for e in listed if e["name"] == self.name)
        except ExpertError:
            raise
        except Exception as error:  # a service may answer anything, or nothing
            raise ExpertError(f"{self._whose} does not tell its version: {type(error).__name__}") from error

    async def read(self, image: bytes) -> Reading:
        """Raises `BadImage` where the service refuses the bytes, `Busy`, or `ExpertError` for all else."""
        path = f"/experts/{quote(self.name, safe='')}/read"
        status, body = await self._ask("POST", path, content=image, headers=dict(self._headers()))
        if status != httpx.codes.OK:
            raise self._refusal(status, body)
        try:
            result = _RESULT.validate_json(body)
        except ValidationError as error:
            raise ExpertError(f"{self._whose} answers nonsense: {error}") from error
        self.version = result.version
        return Reading(result.text, result.confidence)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    @property
    def _whose(self) -> str:
        return f"the expert {self.name!r} at {self._url}"

    async def _ask(self, method: str, path: str, **content: Any) -> tuple[int, bytes]:
        """The answer's status and body, given up as soon as it is too long. Raises `ExpertError`."""
        if self._client is None:
            raise ExpertError(f"the expert {self.name!r} was asked before it was loaded")
        body = bytearray()
        try:
            async with self._client.stream(method, path, **content) as response:
                coding = response.headers.get("content-encoding", "identity")
                if coding != "identity":
                    raise ExpertError(f"{self._whose} answers in {coding[:20]!r}, which it was not asked for")
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _MAX_ANSWER_BYTES:
                        raise ExpertError(f"{self._whose} answers more than {_MAX_ANSWER_BYTES} bytes")
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__} {error}".strip()
            raise ExpertError(f"{self._whose} does not answer: {reason}") from error
        return response.status_code, bytes(body)

    def _refusal(self, status: int, body: bytes) -> ExpertError:
        try:
            message = str(_REFUSAL.validate_json(body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            message = body.decode(errors="replace")
        message = message[:_MAX_MESSAGE]
        if status in (httpx.codes.BAD_REQUEST, httpx.codes.REQUEST_ENTITY_TOO_LARGE):
            return BadImage(message)
        busy = status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
        return (Busy if busy else ExpertError)(f"{self._whose}: {status} {message}")
