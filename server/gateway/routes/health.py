"""GET /health/live, /health/ready, /health and /metrics"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.errors import Unavailable
from server.gateway.state import GatewayDep

router = APIRouter()


@router.api_route("/health/live", methods=["GET", "HEAD"])
async def live() -> Response:
    return JSONResponse({"status": "ok"})


@router.api_route("/health/ready", methods=["GET", "HEAD"])
@router.api_route("/health", methods=["GET", "HEAD"])
async def ready(gateway: GatewayDep) -> Response:
    if gateway.drain.draining:
        raise Unavailable("The server is shutting down.", retry_after=1)
    if not gateway.pool.ready:
        raise Unavailable("No worker is ready yet.", retry_after=1)
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(gateway: GatewayDep) -> Response:
    return Response(gateway.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
