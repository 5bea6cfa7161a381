"""What a request asks its answer to keep to: `response_format`, `tools`, `tool_choice`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.gateway.body import Body, inconsistent, type_tag
from server.worker.messages import Grammar, ToolSchema

MAX_TOOLS = 128

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    """Raises for NaN and Infinity, and for 1e999: a worker would be told null instead."""
    try:
        json.dumps(schema, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("finite_number", "all numbers must be finite") from None
    return schema


Definition = Annotated[dict[str, Any], AfterValidator(_finite)]


class JsonSchema(Body):
    name: Name
    description: str | None = None  # for a model that reads it; ours follow the schema
    definition: Definition | None = Field(None, alias="schema")
    strict: bool | None = None  # true: refused if it cannot be followed to the letter


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise inconsistent("json_schema", "belongs to type json_schema, and is required there")
        return self

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        asked = self.json_schema
        if asked is None or asked.definition is None:
            return Grammar("json_object")
        return Grammar("json_schema", asked.definition, strict=bool(asked.strict))


class Function(Body):
    name: Name
    description: str | None = None
    parameters: Definition | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.parameters and self.parameters.get("type", "object") not in ("object", ["object"]):
            raise inconsistent("parameters", "must be the schema of an object")
        return self

    def schema_for_worker(self) -> ToolSchema:
        """Without `parameters` there are none."""
        none = {"properties": {}, "additionalProperties": False}
        given = none if self.parameters is None else self.parameters
        return ToolSchema(self.name, given | {"type": "object"}, bool(self.strict))


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        fields = {"name", "description", "parameters"}
        return {"type": "function", "function": self.function.model_dump(include=fields, exclude_none=True)}


class ChosenFunction(Body):
    name: str


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[ChosenTool] = Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)


class AllowedChoice(Body):
    """The model is told of all tools, and may call these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_tag(choice: Any) -> str:
    """For a discriminator: a word, tools that are allowed, or one tool."""
    if isinstance(choice, str):
        return "<word>"
    return "<allowed>" if type_tag(choice) == "<allowed_tools>" else "<tool>"


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[ChosenTool, Tag("<tool>")]
    | Annotated[AllowedChoice, Tag("<allowed>")],
    Discriminator(choice_tag),
]


def check_choice(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raises `PydanticCustomError` for names that come twice, and for a choice among no such tools."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise inconsistent("tools", "two functions have the same name")
    if choice == "required" and not tools:
        raise inconsistent("tool_choice", "requires a call, but there are no tools")
    if not _named(choice) <= set(names):
        raise inconsistent("tool_choice", "names a function that is not among the tools")


def _named(choice: ToolChoice | None) -> set[str]:
    if isinstance(choice, ChosenTool):
        return {choice.function.name}
    if isinstance(choice, AllowedChoice):
        return {tool.function.name for tool in choice.allowed_tools.tools}
    return set()


def grammar(
    answer: Grammar | None, tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool
) -> Grammar | None:
    """What the answer has to keep to, if its text is to keep to `answer`; None for free text."""
    if choice == "none" or not tools:
        return answer
    if named := _named(choice):
        tools = [tool for tool in tools if tool.function.name in named]
    one = isinstance(choice, ChosenTool)
    mode = choice.allowed_tools.mode if isinstance(choice, AllowedChoice) else choice
    schemas = tuple(tool.function.schema_for_worker() for tool in tools)
    if one or mode == "required":
        return Grammar("tool_calls", None, schemas, parallel and not one)
    return replace(answer or Grammar("text"), tools=schemas, parallel_calls=parallel)
