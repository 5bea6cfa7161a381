"""GET /v1/models and /v1/models/{id}"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.gateway.openapi import Model, ModelList, documented
from server.gateway.state import GatewayDep
from server.worker.messages import ModelInfo

router = APIRouter()


def model_body(info: ModelInfo) -> dict[str, Any]:
    """OpenAI's model object, and what clients of servers like this one look for."""
    return {
        "id": info.id,
        "object": "model",
        "created": info.created,
        "owned_by": "llama-adapter",
        "root": info.root,
        "parent": info.parent,
        "max_model_len": info.max_model_len,
        "reads_images": info.reads_images,
        "version": info.version,
        "variant": info.variant,
    }


@router.get("/v1/models", **documented("The base and every adapter", ModelList))
async def list_models(gateway: GatewayDep) -> Response:
    return JSONResponse({"object": "list", "data": [model_body(info) for info in gateway.pool.models()]})


@router.get("/v1/models/{id:path}", **documented("One model", Model))
async def retrieve_model(id: str, gateway: GatewayDep) -> Response:
    return JSONResponse(model_body(gateway.pool.model(id)))
