"""What is served: GET /v1/models, /v1/models/{id}, /v1/adapters/{id}/gates and /v1/experts"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.gateway.openapi import ExpertList, Gates, Model, ModelList, documented
from server.gateway.state import CallerDep, GatewayDep
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
        "sampling": info.sampling,
    }


@router.get("/v1/models", **documented("The base and every adapter", ModelList))
async def list_models(gateway: GatewayDep, caller: CallerDep) -> Response:
    models = [model_body(info) for info in gateway.pool.models() if caller.may_ask(info.id)]
    return JSONResponse({"object": "list", "data": models})


@router.get("/v1/models/{id:path}", **documented("One model", Model))
async def retrieve_model(id: str, gateway: GatewayDep, caller: CallerDep) -> Response:
    caller.check_model(id)
    return JSONResponse(model_body(gateway.pool.model(id)))


@router.get("/v1/adapters/{id}/gates", **documented("How strongly an adapter's prompts are heard", Gates))
async def adapter_gates(id: str, gateway: GatewayDep, caller: CallerDep) -> Response:
    caller.check_model(id)
    return JSONResponse(asdict(await gateway.pool.gates(id)))


@router.get("/v1/experts", **documented("What reads images before a model answers", ExpertList))
async def list_experts(gateway: GatewayDep) -> Response:
    experts = [{"id": name, "object": "expert"} for name in gateway.experts.names]
    return JSONResponse({"object": "list", "data": experts})
