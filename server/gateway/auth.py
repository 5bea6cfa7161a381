"""Who is asking: every route but health and the page wants a known key, where the server has keys."""

from __future__ import annotations

from collections.abc import Set

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import Forbidden, Unauthenticated
from server.gateway.keys import Caller, KeyRing

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})


class Authentication:
    """Puts the `Caller` into the scope as `caller`. Asks also on routes that do not exist."""

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: Set[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["caller"] = self._caller(scope)
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        known = self._keys.find(_token(Headers(scope=scope)))
        if known is None and self._keys.required and scope["path"] not in self._open_paths:
            raise Unauthenticated("Give a valid API key: `Authorization: Bearer KEY`.")
        return known or self._keys.anyone


def check_admin(keys: KeyRing, caller: Caller, headers: Headers) -> None:
    """Raises `Forbidden` or `Unauthenticated` unless `caller` came with an admin key."""
    if caller.admin:
        return
    if not keys.has_admin:
        raise Forbidden("This server has no admin keys (admin_keys), so adapters cannot be changed.")
    if not _token(headers):
        raise Unauthenticated("Give an admin key: `Authorization: Bearer KEY`.")
    raise Forbidden("This key is not an admin key.")


def _token(headers: Headers) -> bytes:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
