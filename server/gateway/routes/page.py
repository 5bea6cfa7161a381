"""GET / and /page/…: the page to try the service on, from memory and without a key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent.parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
# Kept by the browser, but asked for again each time: an update shows at once.
_HEADERS = {"content-security-policy": _POLICY, "cache-control": "no-cache"}


@dataclass(frozen=True, slots=True)
class PageFile:
    content: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """The page's files by the path each is served at."""
    files = (path for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES)
    return {"/" if path.name == "index.html" else f"/page/{path.name}": _read(path) for path in files}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    return PageFile(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def page_router(files: Mapping[str, PageFile]) -> APIRouter:
    async def serve(request: Request) -> Response:
        file = files[request.url.path]
        request.scope["answer_headers"].update(_HEADERS)
        if file.etag in _tags(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers={"etag": file.etag})
        return Response(file.content, media_type=file.media_type, headers={"etag": file.etag})

    return APIRouter(routes=[Route(path, serve, methods=["GET"]) for path in files])  # HEAD comes with GET


def _tags(header: str) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in header.split(",")]
