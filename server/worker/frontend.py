"""What happens to a request before its first step: the model's template, tokens, limits, pixels.

Synchronous and without state of its own; called on threads beside the event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from models.chat_template import ToolCall
from models.errors import PromptError
from models.prompts import Context, Turn, render
from models.tokenizer import Tokenizer
from models.vision.images import ImageError, ImageLimits, decode_image
from server.errors import InvalidRequest, model_not_found
from server.worker.grammar import GrammarCompiler, GrammarError, GrammarState
from server.worker.messages import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from server.worker.request import Prepared
from server.worker.scheduler import SequenceRejected, SequenceTooLong
from server.worker.sight import ImageInput, LoadedAdapter

Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An id that requests may name, and what answers to it. `adapter` is None for the base."""

    info: ModelInfo
    adapter: LoadedAdapter | None = None

    @property
    def key(self) -> tuple[str, int]:
        return (self.info.id, self.info.version)

    @property
    def template(self) -> str:
        return self.adapter.adapter.config.template if self.adapter else "chat"


class Room(Protocol):
    """How much text the engine takes; the scheduler's word, or vLLM's."""

    @property
    def max_sequence_len(self) -> int: ...

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raises `SequenceRejected`."""


class Frontend:
    def __init__(
        self,
        tokenizer: Tokenizer,
        room: Room,
        vocab_size: int,
        limits: ImageLimits,
        grammars: GrammarCompiler,
    ) -> None:
        self._tokenizer = tokenizer
        self._room = room
        self._vocab_size = vocab_size
        self._limits = limits
        self._grammars = grammars

    @staticmethod
    def find(models: Mapping[str, ServedModel], id: str) -> ServedModel:
        model = models.get(id)
        if model is None:
            raise model_not_found(id)
        return model

    def prepare(self, model: ServedModel, request: GenerateRequest) -> Prepared:
        """Raises `InvalidRequest` for what can never be answered."""
        token_ids, stop = self._encode(model, request.prompt)
        params = request.sampling
        room = self._room.max_sequence_len - len(token_ids)
        max_tokens = max(room, 1) if params.max_tokens is None else params.max_tokens
        param = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
        try:
            self._room.check_fits(len(token_ids), max_tokens)
        except SequenceTooLong as error:
            raise self._too_long(str(error), param) from None
        except SequenceRejected as error:
            raise InvalidRequest(f"{param}: {error}.", param=param) from None
        if params.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens {params.min_tokens} is more than the {max_tokens} tokens that may be generated.",
                param="min_tokens",
            )
        self._check_bias(params.logit_bias)
        return Prepared(
            request_id=request.request_id,
            token_ids=token_ids,
            sampling=params,
            max_tokens=max_tokens,
            stop=(*params.stop, *stop),
            adapter=model.adapter,
            image=self._image(model.adapter, request.images),
            grammar=self._grammar(params),
            continues_text=not isinstance(request.prompt, ChatPrompt),
        )

    def _grammar(self, params: SamplingParams) -> GrammarState | None:
        if params.grammar is None:
            return None
        for param, contradicts in (("min_tokens", params.min_tokens > 0), ("ignore_eos", params.ignore_eos)):
            if contradicts:  # the grammar says where an answer may end
                raise InvalidRequest(
                    f"{param} cannot be combined with response_format or tools.", param=param
                )
        try:
            return self._grammars.compile(params.grammar)
        except GrammarError as error:
            raise InvalidRequest(
                f"{error.param}: {error}.", param=error.param, code="invalid_schema"
            ) from error

    def tokenize(self, model: ServedModel, prompt: Prompt) -> list[int]:
        return self._encode(model, prompt)[0]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        self._check_ids(token_ids, "tokens")
        return self._tokenizer.decode(token_ids)

    def _encode(self, model: ServedModel, prompt: Prompt) -> tuple[list[int], tuple[str, ...]]:
        """Token ids, and the stop strings that belong to the template."""
        match prompt:
            case TokenPrompt():
                self._check_ids(prompt.token_ids, "prompt")
                return list(prompt.token_ids), ()
            case TextPrompt():
                return self._encode_text(prompt), ()
            case ChatPrompt():
                return self._encode_chat(model, prompt)

    def _refuse_endless(self, texts: Iterable[str], param: str) -> None:
        """Raise `InvalidRequest` for what is too long even if all its tokens are the longest there are.

        To encode it first, and see how many they are, would take minutes.
        """
        longest = self._room.max_sequence_len * self._tokenizer.longest_token
        size = sum(map(len, texts))
        if size > longest:
            raise self._too_long(f"a text of {size} characters cannot fit", param)

    def _too_long(self, why: str, param: str) -> InvalidRequest:
        # It begins with OpenAI's words: LiteLLM and others tell this error by them, not by its code.
        return InvalidRequest(
            f"This model's maximum context length is {self._room.max_sequence_len} tokens: {why}.",
            param=param,
            code="context_length_exceeded",
        )

    def _encode_text(self, prompt: TextPrompt) -> list[int]:
        """A raw prompt is its author's own: special tokens written in it count as such."""
        self._refuse_endless((prompt.text,), "prompt")
        try:
            return self._tokenizer.encode(
                prompt.text, add_special_tokens=prompt.add_special_tokens, parse_special=True
            )
        except PromptError as error:
            raise InvalidRequest(str(error), param="prompt") from error

    def _encode_chat(self, model: ServedModel, prompt: ChatPrompt) -> tuple[list[int], tuple[str, ...]]:
        # To render it takes long, too.
        self._refuse_endless((message.content for message in prompt.messages), "messages")
        try:
            rendered = render(
                model.template,
                [_turn(message) for message in prompt.messages],
                [Context(item.expert, item.text) for item in prompt.context],
                self._tokenizer,
                tools=prompt.tools,
            )
            self._refuse_endless((segment.text for segment in rendered.segments), "messages")
            encoded = self._tokenizer.encode_segments(rendered.segments)
        except PromptError as error:
            raise InvalidRequest(str(error), param="messages") from error
        return encoded.ids, tuple(rendered.stop)

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        bad = next((id for id in token_ids if not 0 <= id < self._vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"Token id {bad} is not in 0 … {self._vocab_size - 1}.", param=param)

    def _check_bias(self, logit_bias: Mapping[int, float]) -> None:
        self._check_ids(tuple(logit_bias), "logit_bias")

    def _image(self, loaded: LoadedAdapter | None, images: Sequence[bytes]) -> ImageInput | None:
        """What the adapter sees: the last image, or what its configuration puts for none."""
        if loaded is None or loaded.encoder is None or loaded.adapter.config.vision is None:
            return None
        vision, encoder = loaded.adapter.config.vision, loaded.encoder
        if not images:
            size = encoder.image_size
            return ImageInput("zero", torch.zeros(3, size, size)) if vision.no_image == "zero" else None
        try:
            pixels = encoder.preprocess(decode_image(images[-1], self._limits), vision.color)
        except ImageError as error:
            raise InvalidRequest(str(error), param="messages", code="invalid_image") from error
        return ImageInput(hashlib.sha256(images[-1]).hexdigest(), pixels)


def _turn(message: ChatMessage) -> Turn:
    calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls)
    return Turn(message.role, message.content, calls, message.tool_call_id)
