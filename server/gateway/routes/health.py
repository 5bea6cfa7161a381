"""GET /health/live, /health/ready, /health, /metrics and /openapi.json"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server.errors import Forbidden, Unavailable
from server.gateway.openapi import REFUSED, Health, documented
from server.gateway.state import CallerDep, GatewayDep
from server.metrics import CONTENT_TYPE

router = APIRouter()

_OPEN: dict[str, Any] = {"security": []}


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", **documented("The process runs", Health, openapi_extra=_OPEN))
async def live() -> Response:
    return JSONResponse({"status": "ok"})


@router.head("/health/ready", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.get("/health/ready", **documented("A request can be answered now", Health, openapi_extra=_OPEN))
@router.get("/health", **documented("A request can be answered now", Health, openapi_extra=_OPEN))
async def ready(gateway: GatewayDep) -> Response:
    if gateway.drain.draining:
        raise Unavailable("The server is shutting down.")
    if not gateway.pool.ready:
        raise Unavailable("No worker is ready yet.")
    return JSONResponse({"status": "ok"})


@router.get(
    "/metrics",
    summary="Prometheus",
    response_class=PlainTextResponse,
    responses={"default": REFUSED},
)
async def metrics(gateway: GatewayDep, caller: CallerDep) -> Response:
    """Models' ids are for keys that may ask all of them, keys' names for those that are to read here."""
    sees_keys = caller.admin or caller.metrics or not gateway.keys.required
    if caller.models is not None and not sees_keys:
        raise Forbidden("This key is for some models alone, and metrics tell of all; use one with `metrics`.")
    return Response(gateway.metrics.render(sees_keys), media_type=CONTENT_TYPE)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    return JSONResponse(request.app.state.openapi)
