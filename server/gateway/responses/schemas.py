"""The body of POST /v1/responses: a conversation of items, and fields that chat names otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from server.gateway.body import Body, inconsistent, type_tag
from server.gateway.constraints import (
    MAX_TOOLS,
    AllowedChoice,
    AllowedTools,
    ChosenFunction,
    ChosenTool,
    Definition,
    Function,
    Name,
    Tool,
    ToolChoice,
    check_choice,
    choice_tag,
    grammar,
)
from server.gateway.schemas import (
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    Detail,
    Experts,
    RefusalPart,
    Sampled,
    Strings,
    at_most,
)
from server.worker.messages import ChatMessage, Grammar, SamplingParams, ToolCall

_LOGPROBS = "message.output_text.logprobs"

# Chat's names of fields, which are the worker's too, and what they are called here.
CHAT_NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "functions": "tools",
    "function_call": "tool_choice",
    "logprobs": f'include: ["{_LOGPROBS}"]',
}


class TextPart(Body):
    type: Literal["input_text", "output_text"]
    text: str


class ImagePart(Body):
    type: Literal["input_image"]
    image_url: str = Field(min_length=1)
    detail: Detail | None = None


TextParts = Annotated[list[TextPart], Field(fail_fast=True)]
Part = Annotated[
    Annotated[TextPart, Tag("<input_text>")]
    | Annotated[TextPart, Tag("<output_text>")]
    | Annotated[ImagePart, Tag("<input_image>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        type_tag,
        custom_error_type="part_type",
        custom_error_message="a part's `type` must be input_text, output_text or input_image",
    ),
]


class MessageItem(Body):
    type: Literal["message"] | None = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise inconsistent("content", "only a user's message may have images")
        return self

    @property
    def parts(self) -> list[Part]:
        return self.content if isinstance(self.content, list) else []

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.parts if not isinstance(part, ImagePart))


class FunctionCallItem(Body):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    arguments: str


class FunctionOutputItem(Body):
    """What a call has led to."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | TextParts

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "\n".join(part.text for part in self.output)


def _item_tag(item: Any) -> str | None:
    return type_tag(item, otherwise="message")


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")],
    Discriminator(
        _item_tag,
        custom_error_type="item_type",
        custom_error_message="an item's `type` must be message, function_call or function_call_output; "
        "nothing is kept that an item_reference could mean",
    ),
]


class Repeated(Body):
    """Comes back with the answer, but for unknown fields: 1e999 among them would come back as Infinity."""

    model_config = ConfigDict(extra="ignore")


class FunctionTool(Function, Repeated):
    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, tool: Any) -> Any:
        """First, since a tool of another type has no `name`, and would be refused for that."""
        if isinstance(tool, dict) and tool.get("type", "function") != "function":
            raise inconsistent("type", "must be function; this server has no tools of its own")
        return tool

    def for_chat(self) -> Tool:
        return Tool(type="function", function=self)


class FunctionChoice(Repeated):
    type: Literal["function"]
    name: str

    def for_chat(self) -> ChosenTool:
        return ChosenTool(type="function", function=ChosenFunction(name=self.name))


class AllowedFunctions(Repeated):
    """The model is told of all tools, and may call these."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)

    def for_chat(self) -> AllowedChoice:
        tools = AllowedTools(mode=self.mode, tools=[tool.for_chat() for tool in self.tools])
        return AllowedChoice(type="allowed_tools", allowed_tools=tools)


class TextFormat(Repeated):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None  # for a model that reads it; ours follow the schema
    definition: Definition | None = Field(None, alias="schema")
    strict: bool | None = None  # true: refused if it cannot be followed to the letter

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        for field, value in (("name", self.name), ("schema", self.definition)):
            if self.type == "json_schema" and value is None:
                raise inconsistent(field, "this field is required")
        return self

    def grammar(self) -> Grammar | None:
        if self.type == "json_schema":
            return Grammar("json_schema", self.definition, strict=bool(self.strict))
        return Grammar("json_object") if self.type == "json_object" else None


class TextOptions(Repeated):
    format: TextFormat | None = None


class ResponseRequest(Sampled):
    """Nothing is kept between requests, so each brings its whole conversation."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "previous_response_id": (None,),
        "conversation": (None,),
        "background": (None, False),
        "truncation": (None, "disabled"),
        "prompt": (None,),
        "context_management": (None, []),
        "moderation": (None,),
        "image": (None,),
        "access_programs": (None,),
        "messages": (None, []),
        "response_format": (None, {"type": "text"}),
        "max_tokens": (None,),
        "max_completion_tokens": (None,),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "logprobs": (None, False),
        "n": (None, 1),
    }
    INSTEAD: ClassVar[dict[str, str]] = CHAT_NAMES
    ID_BEGINS: ClassVar[str] = "resp_"
    CONVERSATION: ClassVar[str] = "input"
    n: ClassVar[None] = None  # there is one answer

    input: str | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    include: Strings | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<word>")]
            | Annotated[FunctionChoice, Tag("<tool>")]
            | Annotated[AllowedFunctions, Tag("<allowed>")],
            Discriminator(choice_tag),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], at_most(16)] | None = None
    experts: Experts | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_choice(self._tools, self._choice)
        return self

    @property
    def limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def scores_tokens(self) -> bool:
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    @property
    def image_urls(self) -> list[tuple[str, str]]:
        """Where each image stands in the body, and its URL; oldest first."""
        return list(self._images())

    def _images(self) -> Iterator[tuple[str, str]]:
        for i, item in enumerate(self._items):
            for p, part in enumerate(item.parts if isinstance(item, MessageItem) else ()):
                if isinstance(part, ImagePart):
                    yield f"input[{i}].content[{p}].image_url", part.image_url

    def for_worker(self) -> tuple[ChatMessage, ...]:
        """The conversation. What the assistant said and the calls that follow it are one message."""
        said = [] if self.instructions is None else [ChatMessage("system", self.instructions)]
        calls = defaultdict[int, list[ToolCall]](list)  # by their message's index
        for item in self._items:
            match item:
                case MessageItem():
                    said.append(ChatMessage("system" if item.role == "developer" else item.role, item.text))
                case FunctionCallItem():
                    if not said or said[-1].role != "assistant":
                        said.append(ChatMessage("assistant", ""))
                    calls[len(said) - 1].append(ToolCall(item.call_id, item.name, item.arguments))
                case FunctionOutputItem():
                    said.append(ChatMessage("tool", item.text, (), item.call_id))
        for index, made in calls.items():
            said[index] = replace(said[index], tool_calls=tuple(made))
        return tuple(said)

    @property
    def tools_for_template(self) -> tuple[dict[str, Any], ...]:
        """What the model is told of tools: nothing if it may not call any."""
        return () if self.tool_choice == "none" else tuple(tool.for_template() for tool in self._tools)

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        answer = self.text.format.grammar() if self.text and self.text.format else None
        kept_to = grammar(answer, self._tools, self._choice, self.parallel_tool_calls is not False)
        return self._sampling(defaults, (self.top_logprobs or 0) if self.scores_tokens else None, kept_to)

    @property
    def _items(self) -> list[Item]:
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def _tools(self) -> list[Tool]:
        return [tool.for_chat() for tool in self.tools or ()]

    @property
    def _choice(self) -> ToolChoice | None:
        choice = self.tool_choice
        return choice if choice is None or isinstance(choice, str) else choice.for_chat()
