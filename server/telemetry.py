"""JSON logs on standard error, each line with the id of the request that it belongs to.

The id and the trace's context travel with a request: `outgoing_headers` sends them, `RequestScope` takes
them up.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
import warnings
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.tracing import inject

log = logging.getLogger(__name__)

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_STANDARD_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a call passes as `extra` becomes its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        extra = record.__dict__.items()
        line |= {key: value for key, value in extra if key not in _STANDARD_ATTRIBUTES and key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII: a path may hold what ends lines or moves a cursor


def configure_logging(level: str) -> None:
    """Send the whole process's logs through `JsonFormatter` from `level` (such as `info`) up.

    Replaces the root logger's handlers. Libraries that tell of each request they make are held to
    warnings: the access log says it once already. Pillow's warnings are not heard at all: they tell of
    damaged metadata, anew for each picture, which is read all the same.
    Raises `ValueError` for an unknown level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers[:] = [handler]
    for name in ("httpx", "httpcore", "PIL"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    warnings.filterwarnings("ignore", module=r"PIL\.")


def accepted_id(headers: Headers) -> str:
    """The client's `x-request-id` if that is sane, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def outgoing_headers() -> dict[str, str]:
    """What tells the next service whose request it works for."""
    current = request_id.get()
    headers = {"x-request-id": current} if current else {}
    inject(headers)
    return headers


class RequestScope:
    """Around a service behind the gateway: its logs carry the id of the request that it works for.

    What only looks (GET) is logged at debug: it is polled every second.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        token = request_id.set(accepted_id(Headers(scope=scope)))
        begun = time.monotonic()
        status = 499  # nobody was there to receive an answer

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            level = logging.DEBUG if scope["method"] == "GET" else logging.INFO
            fields = {"method": scope["method"], "path": scope["path"][:500], "status": status}
            log.log(level, "request", extra={**fields, "seconds": round(time.monotonic() - begun, 4)})
            request_id.reset(token)
