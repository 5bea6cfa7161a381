"""The bodies of requests, as OpenAI's description has them.

Explicit nulls mean the default. Unknown fields are kept in `model_extra`, where the parser finds them
to log them once; those of `UNSUPPORTED` would change the answer and are refused by name.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.gateway.body import Body, inconsistent, type_tag
from server.gateway.constraints import ResponseFormat, ToolChoice, Tools, check_choice, grammar
from server.worker.messages import ChatMessage, Grammar, SamplingParams, ToolCall

MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_BIASES = 1024

_TOKEN_ID = re.compile(r"[0-9]{1,10}")

Count = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
# Lists stop at their first mistake: a hostile body would make millions of them otherwise.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]
Experts = Literal["auto"] | Strings
# Of an image. Has no effect: experts and encoders choose their own size.
Detail = Literal["auto", "low", "high", "original"]


def at_most(limit: int) -> BeforeValidator:
    """Counts the entries of a dictionary first: its own limit comes after all its mistakes."""

    def check(entries: Any) -> Any:
        if isinstance(entries, dict) and len(entries) > limit:
            raise PydanticCustomError("too_long", "at most {limit} entries are allowed", {"limit": limit})
        return entries

    return BeforeValidator(check)


def _biases(entries: Any) -> Any:
    """JSON's keys are strings."""
    if not isinstance(entries, dict):
        return entries
    return {int(key) if _TOKEN_ID.fullmatch(key) else key: bias for key, bias in entries.items()}


LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_biases), at_most(MAX_BIASES)
]


StopText = Annotated[str, Field(min_length=1, max_length=4096)]


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampled(Body):
    """What all that is generated shares."""

    model: str = Field(min_length=1, max_length=512)
    min_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    ignore_eos: bool | None = None
    user: str | None = Field(None, max_length=512)

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if self.min_tokens and self.limit is not None and self.min_tokens > self.limit:
            raise inconsistent("min_tokens", "must not be over the most tokens that may be generated")
        return self

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """The most tokens to generate; None for what the context holds."""

    def _sampling(
        self,
        defaults: Mapping[str, Any],
        logprobs: int | None,
        grammar: Grammar | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        given = dict(defaults) | {
            name: value
            for name in (
                "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
                "frequency_penalty", "repetition_penalty", "logit_bias", "ignore_eos",
            )
            if (value := getattr(self, name)) is not None
        }  # fmt: skip
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if self.top_p == 0:  # no probability at all holds the likeliest token still
            given |= {"top_p": 1.0, "top_k": 1}
        return SamplingParams(
            **given,
            max_tokens=self.limit,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )


# Who sends these to vLLM gets another answer by them, so they must not be passed over.
_OF_VLLM: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": (None, False),
    "continue_final_message": (None, False),
    "truncate_prompt_tokens": (None,),
}


class _Generation(Sampled):
    """What chat and plain completions share."""

    INSTEAD: ClassVar[dict[str, str]] = dict.fromkeys(
        ("guided_json", "structured_outputs"), "response_format"
    )

    max_tokens: Count | None = None
    n: int | None = Field(None, ge=1, le=1024)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ImageUrl(Body):
    url: str = Field(min_length=1)
    detail: Detail | None = None


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        type_tag,
        custom_error_type="part_type",
        custom_error_message="a part's `type` must be text or image_url",
    ),
]


class FunctionCall(Body):
    name: str = Field(min_length=1)
    arguments: str


class ToolCallBody(Body):
    id: str
    type: Literal["function"] | None = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    refusal: str | None = None  # an assistant's, in place of its content
    tool_calls: list[ToolCallBody] | None = Field(None, fail_fast=True)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if (self.model_extra or {}).get("function_call") is not None:
            raise inconsistent("function_call", "is not supported; send tool_calls")
        if self.refusal is not None and self.role != "assistant":
            raise inconsistent("refusal", "only an assistant's message may have a refusal")
        if (
            self.content is None
            and self.refusal is None
            and not (self.role == "assistant" and self.tool_calls)
        ):
            raise inconsistent("content", "this field is required")
        if self.tool_calls and self.role != "assistant":
            raise inconsistent("tool_calls", "only an assistant's message may have tool calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise inconsistent("tool_call_id", "belongs to messages of role tool, and is required there")
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise inconsistent("content", "only a user's message may have images")
        return self

    @property
    def parts(self) -> list[Part]:
        return self.content if isinstance(self.content, list) else []

    def for_worker(self) -> ChatMessage:
        """Its text; images travel apart, in order."""
        texts = [part.text for part in self.parts if not isinstance(part, ImagePart)]
        text = self.content if isinstance(self.content, str) else "\n".join(texts)
        if self.content is None:
            text = self.refusal or ""
        calls = (
            ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ()
        )
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role, text, tuple(calls), self.tool_call_id)


def _image_urls(messages: list[Message]) -> Iterator[tuple[str, str]]:
    for m, message in enumerate(messages):
        for p, part in enumerate(message.parts):
            if isinstance(part, ImagePart):
                yield f"messages[{m}].content[{p}].image_url.url", part.image_url.url


class ChatRequest(_Generation):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = _OF_VLLM | {
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "web_search_options": (None,),
        "moderation": (None,),
    }
    ID_BEGINS: ClassVar[str] = "chatcmpl-"
    CONVERSATION: ClassVar[str] = "messages"  # the field that has it

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    experts: Experts | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise inconsistent("top_logprobs", "needs logprobs to be true")
        check_choice(self.tools or (), self.tool_choice)
        return self

    @property
    def image_urls(self) -> list[tuple[str, str]]:
        """Where each image stands in the body, and its URL; oldest first."""
        return list(_image_urls(self.messages))

    def for_worker(self) -> tuple[ChatMessage, ...]:
        """The conversation."""
        return tuple(message.for_worker() for message in self.messages)

    @property
    def tools_for_template(self) -> tuple[dict[str, Any], ...]:
        """What the model is told of tools: nothing if it may not call any."""
        tools = () if self.tool_choice == "none" else self.tools or ()
        return tuple(tool.for_template() for tool in tools)

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """`defaults` are the model's, for what the request leaves out."""
        answer = self.response_format.grammar() if self.response_format else None
        parallel = self.parallel_tool_calls is not False
        kept_to = grammar(answer, self.tools or (), self.tool_choice, parallel)
        return self._sampling(defaults, (self.top_logprobs or 0) if self.logprobs else None, kept_to)


class CompletionRequest(_Generation):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = _OF_VLLM | {"suffix": (None, "")}
    ID_BEGINS: ClassVar[str] = "cmpl-"

    prompt: str | Strings | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """One entry per prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        flat = [item for item in self.prompt if isinstance(item, int)]
        if flat:
            return [tuple(flat)]
        return [
            item if isinstance(item, str) else tuple(item)
            for item in self.prompt
            if not isinstance(item, int)
        ]

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default here

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        kept_to = self.response_format.grammar() if self.response_format else None
        return self._sampling(defaults, self.logprobs, kept_to, self.logprobs if self.echo else None)

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if not self.prompts or () in self.prompts:
            raise inconsistent("prompt", "must not be an empty list")
        if self.max_tokens == 0 and not self.echo:
            raise inconsistent("max_tokens", "may be 0 only with echo")
        return self


class TokenizeBody(Body):
    model: str = Field(min_length=1, max_length=512)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    tools: Tools | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise inconsistent("prompt", "give either prompt or messages")
        if self.tools and self.messages is None:
            raise inconsistent("tools", "belong to messages")
        if any(_image_urls(self.messages or [])):
            raise inconsistent(
                "messages", "cannot be counted with images, whose text experts are yet to read"
            )
        return self


class DetokenizeBody(Body):
    model: str = Field(min_length=1, max_length=512)
    tokens: TokenIds


class AdapterBody(Body):
    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,95}$")
    path: str = Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")
    options: Annotated[dict[str, Annotated[str, Field(max_length=256)]], at_most(16)] | None = None
