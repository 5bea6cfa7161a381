"""API keys."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import Forbidden, Unauthenticated

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})


class Keys:
    """Compares a request's Bearer token with the known ones, in time that does not tell how near it is."""

    def __init__(self, api_keys: Iterable[str], admin_keys: Iterable[str]) -> None:
        self._api = [key.encode() for key in api_keys]
        self._admin = [key.encode() for key in admin_keys]

    def check(self, headers: Headers) -> None:
        """Raises `Unauthenticated` unless no key is asked for, or a known one is given."""
        if self._api and not self._matches(headers, [*self._api, *self._admin]):
            raise Unauthenticated("Give a valid API key: `Authorization: Bearer KEY`.")

    def check_admin(self, headers: Headers) -> None:
        """Raises `Forbidden` or `Unauthenticated` unless an admin key is given."""
        if not self._admin:
            raise Forbidden("This server has no admin keys (admin_keys), so adapters cannot be changed.")
        if not _token(headers):
            raise Unauthenticated("Give an admin key: `Authorization: Bearer KEY`.")
        if not self._matches(headers, self._admin):
            raise Forbidden("This key is not an admin key.")

    def _matches(self, headers: Headers, keys: list[bytes]) -> bool:
        token = _token(headers)
        return sum(hmac.compare_digest(token, key) for key in keys) > 0  # compares with all of them, always


def _token(headers: Headers) -> bytes:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


class Authentication:
    """Asks for a key on every route but health, also on those that do not exist."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            self._keys.check(Headers(scope=scope))
        await self._app(scope, receive, send)
