"""What travels between gateway and worker: frozen dataclasses, owned by the worker, free of torch.

A request goes as a line of JSON, the answer comes back as one JSON event a line. What stands below the
classes is all that (de)serialises them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

_CONFIG = ConfigDict(extra="forbid")
_PIECE = 2**20  # bytes of an image that are handed on at once
SCORES = 256  # tokens of a prompt whose log-probabilities are one line: 100 KB with five others beside each

FinishReason = Literal["stop", "length", "abort", "tool_calls"]


@dataclass(frozen=True, slots=True)
class ContextItem:
    """What one expert read in one image, on its way into the prompt."""

    expert: str
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON text, as the wire has it


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages, rendered by the model's own template; the context goes in as the papers put it."""

    messages: tuple[ChatMessage, ...]
    context: tuple[ContextItem, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    type: Literal["chat"] = "chat"


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str
    add_special_tokens: bool = True
    type: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...]
    type: Literal["tokens"] = "tokens"


Prompt = Annotated[ChatPrompt | TextPrompt | TokenPrompt, Field(discriminator="type")]


@dataclass(frozen=True, slots=True)
class ToolSchema:
    """A tool that may be called. `parameters` is the JSON schema of its arguments.

    A `strict` tool is refused where that cannot be followed. Of another one's, what is not known is passed
    over, and arguments are any object where nothing else helps.
    """

    name: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Grammar:
    """What constrained decoding has to keep to: an answer of this kind, or calls of these tools.

    `text` is free text, `tool_calls` is no answer but calls; `schema` is a JSON schema, for kind
    `json_schema` only. Of one that is not `strict`, keywords that are not known are passed over.
    """

    kind: Literal["json_object", "json_schema", "text", "tool_calls"]
    schema: dict[str, Any] | None = None
    tools: tuple[ToolSchema, ...] = ()
    parallel_calls: bool = True  # several calls in one answer
    strict: bool = True


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The defaults are OpenAI's; 0 temperature is argmax."""

    max_tokens: int | None = None  # None: up to the context's end
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # None: off; n: the chosen token and the n best
    prompt_logprobs: int | None = None  # the same for the prompt's tokens (`echo` with `logprobs`)
    ignore_eos: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. `images` are encoded files (PNG, JPEG, …), oldest first."""

    __pydantic_config__ = _CONFIG

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    images: tuple[bytes, ...] = ()
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    token: str
    logprob: float
    raw: tuple[int, ...] | None = None  # its bytes, where `token` cannot tell them


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`logprob` is None for a prompt's first token, which nothing precedes."""

    token_id: int
    token: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()
    raw: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """First event: the prompt was accepted. Nothing is generated yet."""

    prompt_tokens: int
    type: Literal["started"] = "started"


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The request left the queue: its prompt's first tokens are in the step that runs now."""

    queued_seconds: float  # since its prompt was ready
    type: Literal["scheduled"] = "scheduled"


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The prompt's log-probabilities, for requests that asked for `prompt_logprobs`. A worker gives pieces.

    `text` is the whole prompt's, in the last piece: of a part of its tokens it may be half a character.
    """

    logprobs: tuple[TokenLogprob, ...]
    text: str
    more: bool = False  # pieces follow
    type: Literal["prompt_scored"] = "prompt_scored"


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the answer's call number `index`. The first one has the name, all have arguments' text."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """New text. Never a partial UTF-8 character, a special token or the beginning of a stop string.

    What a request with tools is answered in calls is not text, but `tool_calls`.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()
    type: Literal["delta"] = "delta"


@dataclass(frozen=True, slots=True)
class Finished:
    finish_reason: FinishReason
    usage: Usage
    type: Literal["finished"] = "finished"


@dataclass(frozen=True, slots=True)
class Failed:
    """Last event of a request that could not be finished; fields as in `server.errors.ApiError`."""

    status: int
    message: str
    error_type: str
    code: str | None = None
    param: str | None = None
    type: Literal["failed"] = "failed"


Event = Annotated[Started | Scheduled | PromptScored | Delta | Finished | Failed, Field(discriminator="type")]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One id that a request's `model` may name: the base, or an adapter on it."""

    id: str
    kind: Literal["base", "adapter"]
    root: str  # the folder's or file's name it was loaded from
    parent: str | None  # the base's id, for an adapter
    created: int  # Unix seconds
    max_model_len: int
    reads_images: bool = False
    version: int = 1  # counts reloads under the same id
    variant: str = ""
    # Fields of `SamplingParams`, for requests that leave them out.
    sampling: dict[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterGates:
    """How strongly each layer and head hears an adapter's prompts, and what the adapter is.

    `gates` are the magnitudes of the effective gates [layers][heads], zero in layers without prompts.
    """

    layers: int
    heads: int
    gates: tuple[tuple[float, ...], ...]
    gated_layers: tuple[int, ...]  # those that hold prompts, ascending
    variant: str
    prompt_len: int  # rows of the longest prompt
    num_parameters: int
    description: str


@dataclass(frozen=True, slots=True)
class LoadAdapterRequest:
    """`options` are those of the command line's `id=path,option=value`, as texts."""

    id: str
    path: str
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    model: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Tokenized:
    token_ids: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    model: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Detokenized:
    text: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; counters run since the engine's start."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int  # held by running requests; cached blocks nobody holds count as free
    prefix_cache_queries: int  # tokens looked up
    prefix_cache_hits: int  # tokens found
    preemptions: int
    adapters_loaded: int
    adapters_hot: int  # in the bank now
    prompt_slots_used: int
    steps: int
    ready: bool = True
    draining: bool = False
    max_requests: int = 0  # that may run and wait together; 0: not told


EVENT: TypeAdapter[Started | Scheduled | PromptScored | Delta | Finished | Failed] = TypeAdapter(Event)
MODELS: TypeAdapter[list[ModelInfo]] = TypeAdapter(list[ModelInfo])
_GENERATE: TypeAdapter[GenerateRequest] = TypeAdapter(GenerateRequest)


def generate_body(request: GenerateRequest) -> Iterator[bytes]:
    """The body of `POST /generate`, in pieces: a line of JSON, then each image after a line with its size.

    As base64 in the JSON an image of 20 MiB would hold the interpreter of either side for 25 ms.
    """
    yield _GENERATE.dump_json(request, exclude={"images"}) + b"\n"
    for image in request.images:
        yield b"%d\n" % len(image)
        yield from (image[start : start + _PIECE] for start in range(0, len(image), _PIECE))


def read_generate_body(body: bytes) -> GenerateRequest:
    """Raises pydantic's `ValidationError` for what is wrong in the JSON, `ValueError` for the images."""
    line, position = _line(body, 0)
    request = _GENERATE.validate_json(line)
    images = []
    while position < len(body):
        line, start = _line(body, position)
        if not line.isdigit():
            raise ValueError("an image must come after a line with its size in bytes")
        position = start + int(line[:20])
        if position > len(body):
            raise ValueError("an image is shorter than its size says")
        images.append(body[start:position])
    return replace(request, images=tuple(images))


def score_pieces(logprobs: Sequence[TokenLogprob], text: str | None) -> Iterator[PromptScored]:
    """The next part of a prompt's, in lines that hold up neither side for long.

    `text` is None where not all of the prompt is scored yet.
    """
    for start in range(0, len(logprobs), SCORES):
        end = start + SCORES
        last = text if end >= len(logprobs) else None
        yield PromptScored(tuple(logprobs[start:end]), last or "", more=last is None)


def join_scores(pieces: Sequence[PromptScored]) -> PromptScored:
    """The whole prompt's, of all its pieces."""
    return PromptScored(tuple(token for piece in pieces for token in piece.logprobs), pieces[-1].text)


def _line(body: bytes, start: int) -> tuple[bytes, int]:
    """The line that begins at `start`, and where the next begins."""
    end = body.find(b"\n", start)
    return (body[start:], len(body)) if end < 0 else (body[start:end], end + 1)
