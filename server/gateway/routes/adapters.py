"""GET and POST /v1/adapters, DELETE /v1/adapters/{id}: for admin keys only"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from server.gateway.openapi import Deleted, Model, ModelList, documented
from server.gateway.parsing import json_body
from server.gateway.routes.models import model_body
from server.gateway.schemas import AdapterBody
from server.gateway.state import AdminOnly, GatewayDep
from server.worker.messages import LoadAdapterRequest

router = APIRouter(dependencies=[AdminOnly])

_ADMIN: dict[str, Any] = {"security": [{"bearer": []}]}


@router.get("/v1/adapters", **documented("Every adapter", ModelList, openapi_extra=_ADMIN))
async def list_adapters(gateway: GatewayDep) -> Response:
    adapters = [model_body(info) for info in gateway.pool.models() if info.kind == "adapter"]
    return JSONResponse({"object": "list", "data": adapters})


@router.post(
    "/v1/adapters",
    **documented("Load an adapter", Model, AdapterBody, status=201, openapi_extra=_ADMIN),
)
async def load_adapter(
    body: Annotated[AdapterBody, Depends(json_body(AdapterBody))], gateway: GatewayDep
) -> Response:
    info = await gateway.pool.load_adapter(LoadAdapterRequest(body.id, body.path, body.options or {}))
    return JSONResponse(model_body(info), status_code=201)


@router.delete("/v1/adapters/{id}", **documented("Unload an adapter", Deleted, openapi_extra=_ADMIN))
async def unload_adapter(id: str, gateway: GatewayDep) -> Response:
    await gateway.pool.unload_adapter(id, gateway.settings.request_seconds)
    return JSONResponse({"id": id, "object": "model", "deleted": True})
