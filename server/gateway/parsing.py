"""From the bytes of a body to a checked request, or a 400 that names the field."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers

from server.errors import InvalidRequest, SlowBody, TooLarge, UnsupportedMedia
from server.gateway.body import INCONSISTENT, Body
from server.settings import GatewaySettings

log = logging.getLogger(__name__)

Schema = TypeVar("Schema", bound=Body)

_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "constrained-str"})
# Unknown field names and their characters: clients choose them, so there must be an end.
_MAX_REMEMBERED = 1000
_NAME_LENGTH = 100


class IgnoredFields:
    """Tells the log once of each field that clients send and nobody reads."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, body: BaseModel) -> None:
        for name in {name[:_NAME_LENGTH] for name in body.model_extra or ()} - self._seen:
            if len(self._seen) < _MAX_REMEMBERED:
                self._seen.add(name)
                log.warning("a request field is unknown and ignored", extra={"field": name})


def json_body(schema: type[Schema]) -> Callable[[Request], Awaitable[Schema]]:
    """A dependency that reads the request's body as `schema`."""

    async def read(request: Request) -> Schema:
        gateway = request.app.state.gateway
        raw = await _read_in_time(request, gateway.settings)
        _refuse_crowded(raw, gateway.settings.max_body_values)
        body = parse(schema, raw)
        gateway.ignored_fields.note(body)
        return body

    return read


async def _read_in_time(request: Request, settings: GatewaySettings) -> bytes:
    try:
        async with asyncio.timeout(settings.body_seconds):
            return await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise SlowBody(
            f"The body did not arrive within {settings.body_seconds:g} s (body_seconds)."
        ) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    _refuse_media(request.headers)
    too_large = TooLarge(f"The body is over {max_bytes} bytes; send less, or images as URLs.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _refuse_media(headers: Headers) -> None:
    """Raise `UnsupportedMedia` for what is not plain JSON."""
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMedia(
            f"The body must be JSON; send `Content-Type: application/json`, not {kind[:100]!r}."
        )
    coding = headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise UnsupportedMedia(
            f"The body must not be compressed; send it without `Content-Encoding: {coding[:100]}`."
        )


def _refuse_crowded(raw: bytes, most: int) -> None:
    """Raise `TooLarge` for what would hold the event loop for long: a few megabytes of empty lists take
    seconds and gigabytes to parse. Each value comes after a comma or a bracket; those in texts count too.
    """
    if len(raw) <= most:
        return
    left = most
    for sign in (b",", b"[", b"{"):
        position = raw.find(sign)  # skips an image in no time, where `count` looks at each byte
        while position >= 0:
            left -= 1
            if left < 0:
                raise TooLarge(f"The body holds over {most} JSON values (max_body_values); send fewer.")
            position = raw.find(sign, position + 1)


def parse(schema: type[Schema], raw: bytes) -> Schema:
    """`raw` as `schema`. Raises `InvalidRequest` naming the field in `param`."""
    try:
        body = schema.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(_most_telling(error)) from None
    for name, harmless in schema.UNSUPPORTED.items():
        if (body.model_extra or {}).get(name) not in harmless:
            instead = schema.INSTEAD.get(name)
            raise InvalidRequest(
                f"{name} is not a field of this route; send {instead}."
                if instead
                else f"{name} is not supported by this server; leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    return body


def _most_telling(error: ValidationError) -> ErrorDetails:
    """Of the first field's errors the deepest, and one whose type is right: the branch of a union that fitted
    furthest.
    """
    errors = error.errors(include_url=False, include_input=False)
    first = (e for e in errors if e["loc"][:1] == errors[0]["loc"][:1])
    return max(first, key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))


def _refusal(error: ErrorDetails) -> InvalidRequest:
    if error["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {error['msg']}.", code="invalid_json")
    if error["type"] == "model_type" and not error["loc"]:
        return InvalidRequest("The body must be a JSON object.", code="invalid_json")
    own_field = (error["ctx"]["field"],) if error["type"] == INCONSISTENT else ()
    param = _param(error["loc"] + own_field)
    message = "this field is required" if error["type"] == "missing" else error["msg"]
    return InvalidRequest(f"{param or 'body'}: {message}", param=param)


def _param(loc: tuple[int | str, ...]) -> str | None:
    """`messages[0].content[1].text` of pydantic's location, without the names of union branches."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _TYPE_NAMES and not any(sign in part for sign in "[(<"):
            path += f".{part[:100]}" if path else part[:100]
    return path or None
