"""An expert that runs elsewhere, behind the routes of `experts.app`. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from experts.contract import BadImage, ExpertError, ExpertResult, Reading

# Whoever asks sets a deadline of its own; these only keep a dead peer from holding a connection.
TIMEOUT = httpx.Timeout(connect=2.0, read=120.0, write=10.0, pool=5.0)

_RESULT = TypeAdapter(ExpertResult)
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
        """Ask for the version. A service that is not up yet is no error: it may come."""
        socket = self._url.removeprefix("unix:") if self._url.startswith("unix:") else None
        self._client = httpx.AsyncClient(
            base_url="http://expert" if socket else self._url,
            transport=httpx.AsyncHTTPTransport(uds=socket),
            timeout=self._timeout,
        )
        try:
            listed = (await self._client.get("/experts")).raise_for_status().json()
            self.version = next(str(e["version"]) for e in listed if e["name"] == self.name)
        except (httpx.HTTPError, ValueError, LookupError, TypeError, StopIteration):
            self.version = _UNKNOWN

    async def read(self, image: bytes) -> Reading:
        """Raises `BadImage` where the service refuses the bytes, `ExpertError` for all else."""
        if self._client is None:
            raise ExpertError(f"the expert {self.name!r} was asked before it was loaded")
        path = f"/experts/{quote(self.name, safe='')}/read"
        try:
            response = await self._client.post(path, content=image, headers=dict(self._headers()))
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__} {error}".strip()
            raise ExpertError(f"the expert {self.name!r} at {self._url} does not answer: {reason}") from error
        if response.status_code != httpx.codes.OK:
            raise self._refusal(response)
        try:
            result = _RESULT.validate_json(response.content)
        except ValidationError as error:
            raise ExpertError(f"the expert {self.name!r} at {self._url} answers nonsense: {error}") from error
        self.version = result.version
        return Reading(result.text, result.confidence)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def _refusal(self, response: httpx.Response) -> ExpertError:
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, LookupError, TypeError):
            message = response.text[:200]
        if response.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.REQUEST_ENTITY_TOO_LARGE):
            return BadImage(message)
        return ExpertError(f"the expert {self.name!r} at {self._url}: {response.status_code} {message}")
