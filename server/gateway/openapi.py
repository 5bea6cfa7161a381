"""The service's own description, for `/openapi.json`: what it accepts, answers and refuses.

Request bodies are described by the schemas that parse them. Answers are described here, as far as they
are promised; they may carry more.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from server.gateway.body import Body
from server.gateway.responses.schemas import ResponseRequest
from server.gateway.schemas import (
    AdapterBody,
    ChatRequest,
    CompletionRequest,
    DetokenizeBody,
    TokenizeBody,
)

_BODIES: tuple[type[Body], ...] = (
    ChatRequest,
    ResponseRequest,
    CompletionRequest,
    TokenizeBody,
    DetokenizeBody,
    AdapterBody,
)
_REF = "#/components/schemas/{model}"
_BEARER = {"bearer": {"type": "http", "scheme": "bearer"}}


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Health(_Answer):
    status: Literal["ok"]


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    reads_images: bool
    version: int
    variant: str
    sampling: dict[str, int | float]


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


class Gates(_Answer):
    layers: int
    heads: int
    gates: list[list[float]]
    gated_layers: list[int]
    variant: str
    prompt_len: int
    num_parameters: int
    description: str


class ExpertModel(_Answer):
    id: str
    object: Literal["expert"]


class ExpertList(_Answer):
    object: Literal["list"]
    data: list[ExpertModel]


class Deleted(_Answer):
    id: str
    object: Literal["model"]
    deleted: Literal[True]


class Tokens(_Answer):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(_Answer):
    prompt: str


class UsageCounts(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChatChoice(_Answer):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatCompletion(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageCounts


class OutputItem(_Answer):
    type: Literal["message", "function_call"]
    id: str
    status: Literal["completed", "incomplete"]


class ResponseUsage(_Answer):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponseObject(_Answer):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputItem]
    usage: ResponseUsage


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class Completion(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageCounts


# The model alone would be described as of the route's own media type.
REFUSED: dict[str, Any] = {
    "description": "Refused, or failed",
    "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
}


def documented(
    summary: str, answer: type[BaseModel], body: type[Body] | None = None, *, status: int = 200, **more: Any
) -> dict[str, Any]:
    """A route decorator's arguments: it reads `body`, answers `answer`, or an `Error` of any other status."""
    described: dict[str, Any] = dict(more.pop("openapi_extra", {}))
    if body is not None:
        content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
        described["requestBody"] = {"required": True, "content": content}
    success: dict[str, Any] = {"model": answer}
    if more.pop("streams", False):
        # Without a schema: OpenAPI 3.1 has no word for one event, and readers differ on what it would mean.
        success["content"] = {"text/event-stream": {}}
    return {
        "summary": summary,
        "status_code": status,
        "responses": {status: success, "default": REFUSED},
        "openapi_extra": described,
        **more,
    }


def describe(app: FastAPI, asks_for_keys: bool) -> dict[str, Any]:
    """The OpenAPI document of `app`."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    models: list[type[BaseModel]] = [*_BODIES, Error]
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    for body in _BODIES:
        properties = schemas["$defs"][body.__name__]["properties"]
        for name, harmless in body.UNSUPPORTED.items():
            properties.setdefault(name, {"enum": list(harmless), "description": "not supported"})
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas["$defs"])
    components["securitySchemes"] = _BEARER
    if asks_for_keys:
        document["security"] = [{"bearer": []}]
    return document
