"""docs/api.md says all there is: routes, fields, error codes, metrics; and each field is read somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming as ResponseParams

from server.errors import ApiError
from server.gateway.app import create_app
from server.gateway.body import Body
from server.gateway.constraints import (
    AllowedChoice,
    AllowedTools,
    ChosenTool,
    Function,
    JsonSchema,
    ResponseFormat,
    Tool,
)
from server.gateway.responses import schemas as responses
from server.gateway.schemas import (
    AdapterBody,
    ChatRequest,
    CompletionRequest,
    DetokenizeBody,
    ImageUrl,
    Message,
    StreamOptions,
    TokenizeBody,
)
from server.settings import GatewaySettings

ROOT = Path(__file__).parents[3]
REFERENCE = (ROOT / "docs/api.md").read_text()
SOURCES = {path: path.read_text() for path in (ROOT / "server/gateway").rglob("*.py")}
SCHEMAS = [
    ChatRequest,
    Message,
    ImageUrl,
    StreamOptions,
    ResponseFormat,
    JsonSchema,
    Tool,
    Function,
    ChosenTool,
    AllowedChoice,
    AllowedTools,
    responses.ResponseRequest,
    responses.MessageItem,
    responses.FunctionCallItem,
    responses.FunctionOutputItem,
    responses.ImagePart,
    responses.FunctionTool,
    responses.AllowedFunctions,
    responses.TextFormat,
    CompletionRequest,
    TokenizeBody,
    DetokenizeBody,
    AdapterBody,
]
UNREAD = {"detail"}  # clients send it by habit; the reference says that it has no effect


def test_every_route() -> None:
    paths = {*create_app(GatewaySettings(), {}).state.openapi["paths"], "/openapi.json"}
    assert len(paths) > 10
    for path in paths:
        assert f" {path}`" in REFERENCE, path


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field(schema: type[Body]) -> None:
    fields = [field.alias or name for name, field in schema.model_fields.items()]
    for name in [*fields, *schema.UNSUPPORTED]:
        assert re.search(rf"[`.\"]{name}[`.\"]", REFERENCE), name
    source = "".join(SOURCES.values())
    for name in set(schema.model_fields) - UNREAD:
        assert re.search(rf"\.{name}\b|\"{name}\",", source), f"{name} is accepted and never read"


@pytest.mark.parametrize(
    ("schema", "params"),
    [
        (ChatRequest, ChatParams),
        (responses.ResponseRequest, ResponseParams),
        (CompletionRequest, CompletionParams),
    ],
)
def test_every_parameter_of_the_stock_client(schema: type[Body], params: type) -> None:
    """None of them is forgotten: what is neither honoured nor refused is said to have no effect."""
    names = {name for part in params.__mro__ for name in getattr(part, "__annotations__", ())}
    unread = names - schema.model_fields.keys() - schema.UNSUPPORTED.keys()
    silent = "".join(line for line in REFERENCE.splitlines() if "none has an effect here" in line)
    assert {name for name in unread if f"`{name}`" not in silent} == set()


def test_every_error_code() -> None:
    codes = {
        code for text in SOURCES.values() for code in re.findall(r'code="(\w+)"|, "(image_\w+)"\)', text)
    }
    named = {code for pair in codes for code in pair if code}
    assert {"invalid_json", "image_fetch_timeout", "image_too_large"} <= named
    named |= {cls.default_code for cls in ApiError.__subclasses__() if cls.default_code}
    for code in named:
        assert f"`{code}`" in REFERENCE, code
