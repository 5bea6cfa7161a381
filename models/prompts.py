"""From a conversation to a prompt: the templates that bases and adapters were trained with.

Inference and training render with the same code. Experts' context goes in as in LLaMA-Adapter V2,
section 4.4, before the question that it is to help with. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from models.chat_template import ToolCall, render_chat
from models.errors import PromptError
from models.tokenizer import Segment, Tokenizer
from models.tool_text import CALL_SEPARATOR, call_text, preamble, response_text, speaks_calls

CAPTION_PROMPT = "Generate caption of this image :"

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    is_result: bool = False  # a tool's, told as by the user: not what is asked


@dataclass(frozen=True, slots=True)
class Context:
    """What one expert read in one image."""

    expert: str
    text: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt for `Tokenizer.encode_segments`, and the strings that end an answer in its template."""

    segments: tuple[Segment, ...]
    stop: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


def render(
    template: str,
    turns: Sequence[Turn],
    context: Sequence[Context],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Rendered:
    """Render a conversation by the named template (a key of `TEMPLATES`, or `chat`).

    With `add_generation_prompt` the prompt ends where the model is to answer. Without it, and with an
    answer as the last turn, it is a training sample: the segments of answers, with the EOS that ends
    them, are flagged `generated`. `tools` are as OpenAI's requests have them. Raises PromptError for an
    unknown template, for no turns, and for what a base's own template refuses.
    """
    if not turns:
        raise PromptError("there are no messages; send at least one")
    text = context_text(context)
    if template == "chat":
        turns = _with_context(turns, text)
        if not speaks_calls(tokenizer.chat_template):
            turns, tools = _in_plain_text(turns, tools), ()
        return _chat(turns, tokenizer, add_generation_prompt, tools)
    if template not in TEMPLATES:
        raise PromptError(f"template {template!r} is unknown; known: {', '.join(template_names())}")
    turns = _in_plain_text(turns, tools)
    spec = TEMPLATES[template]
    segments = spec.build(turns, text, _eos(tokenizer), add_generation_prompt)
    return Rendered(tuple(segment for segment in segments if segment.text), spec.stop)


def template_names() -> tuple[str, ...]:
    return ("chat", *TEMPLATES)


def context_text(context: Iterable[Context]) -> str:
    """The experts' readings as the paper has them, a line each: `OCR Context: …`, `[Caption expert: …]`."""
    # A reading is one line. Of eight questions on texts from images SmolLM2-135M answered 8 so; with the
    # text's own lines 7, with "Question:" before the question 6, after the question 6, as system text 5.
    lines = []
    for item in context:
        text = " ".join(item.text.split())
        name = item.expert[:1].upper() + item.expert[1:]
        if text:
            lines.append(f"OCR Context: {text}" if item.expert == "ocr" else f"[{name} expert: {text}]")
    return "\n".join(lines)


def _with_context(turns: Sequence[Turn], text: str) -> list[Turn]:
    """The turns with the context before the question; at worst in one of its own."""
    turns = list(turns)
    if not text:
        return turns
    last = _question(turns)
    if last is None:
        return [*turns, Turn("user", text)]
    turns[last] = replace(turns[last], content="\n".join(filter(None, (text, turns[last].content))))
    return turns


def _question(turns: Sequence[Turn]) -> int | None:
    """Where the user last asked something; where there are results alone, the last of them."""
    asked = [(not turn.is_result, index) for index, turn in enumerate(turns) if turn.role == "user"]
    return max(asked)[1] if asked else None


def _in_plain_text(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """For a template that does not know tools: as system text, calls as answers, results as questions."""
    plain = [_without_tools(turn) for turn in turns]
    if tools and plain[0].role == "system":
        plain[0] = replace(plain[0], content=f"{plain[0].content}\n\n{preamble(tools)}")
    elif tools:
        plain.insert(0, Turn("system", preamble(tools)))
    return plain


def _without_tools(turn: Turn) -> Turn:
    if turn.role == "tool":
        return Turn("user", response_text(turn.content), is_result=True)
    if not turn.tool_calls:
        return turn
    calls = CALL_SEPARATOR.join(call_text(call.name, call.arguments) for call in turn.tool_calls)
    return replace(turn, content="\n".join(filter(None, (turn.content, calls))), tool_calls=())


def _chat(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]],
) -> Rendered:
    messages = [
        {"role": turn.role, "content": turn.content}
        | ({"tool_calls": [call.message() for call in turn.tool_calls]} if turn.tool_calls else {})
        | ({"tool_call_id": turn.tool_call_id} if turn.tool_call_id else {})
        for turn in turns
    ]
    segments = render_chat(messages, tools, tokenizer, add_generation_prompt)
    return Rendered(tuple(segments))


Build = Callable[[Sequence[Turn], str, str, bool], Iterable[Segment]]


@dataclass(frozen=True, slots=True)
class _Template:
    """`build(turns, context text, EOS text, add_generation_prompt)` gives the segments."""

    build: Build
    stop: tuple[str, ...] = ()


def _markup(text: str) -> Segment:
    return Segment(text, markup=True)


def _user(text: str) -> Segment:
    return Segment(text, markup=False)


def _answer(text: str, eos: str) -> list[Segment]:
    """What the model writes: its text, then EOS."""
    return [Segment(text, markup=False, generated=True), Segment(eos, markup=True, generated=True)]


def _eos(tokenizer: Tokenizer) -> str:
    return "" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id)


def _system(turns: Sequence[Turn]) -> str:
    return "\n".join(turn.content for turn in turns if turn.role == "system" and turn.content)


_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


def _alpaca(turns: Sequence[Turn], context: str, eos: str, add_generation_prompt: bool) -> Iterable[Segment]:
    """V1's prompt. System texts and context are the `### Input:` of the last instruction.

    V1 knows one turn only; further ones repeat the blocks, each answer ended by EOS.
    """
    talk = [turn for turn in turns if turn.role != "system"]
    last = _question(talk)
    given = "\n".join(filter(None, (_system(turns), context)))
    if last is None:  # nothing was asked: the input alone is the instruction
        talk, last, given = [Turn("user", given), *talk], 0, ""
    yield _markup(_ALPACA_INPUT if given else _ALPACA)
    for index, turn in enumerate(talk):
        if turn.role == "assistant":
            yield _markup("\n\n### Response:" if index else "### Response:")
            yield from _answer(turn.content, eos)
            continue
        yield _markup("\n\n### Instruction:\n" if index else "### Instruction:\n")
        yield _user(turn.content)
        if index == last and given:
            yield _markup("\n\n### Input:\n")
            yield _user(given)
    if add_generation_prompt:
        yield _markup("\n\n### Response:")


_VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def _vicuna_v1(
    turns: Sequence[Turn], context: str, eos: str, add_generation_prompt: bool
) -> Iterable[Segment]:
    """The chat-65B adapter's `v1`: a sentence and turns, each ended by `###`, which the model writes too.

    The original shows a fixed question and answer after the sentence; it is left out here.
    """
    system = _system(turns)
    yield _user(system) if system else _markup(_VICUNA_SYSTEM)
    yield _markup("###")
    for turn in _with_context(turns, context):
        if turn.role == "user":
            yield from (_markup("Human: "), _user(turn.content), _markup("###"))
        elif turn.role == "assistant":
            yield _markup("Assistant:")
            yield Segment(f" {turn.content}", markup=False, generated=True)
            yield Segment("###", markup=True, generated=True)
    if add_generation_prompt:
        yield _markup("Assistant:")


def _bair_v1(turns: Sequence[Turn], context: str, eos: str, add_generation_prompt: bool) -> Iterable[Segment]:
    """The chat-65B adapter's `bair_v1`: `USER: … GPT: …` and EOS. System texts come after the heading."""
    yield _markup("BEGINNING OF CONVERSATION: ")
    system = _system(turns)
    if system:
        yield _user(f"{system} ")
    for turn in _with_context(turns, context):
        if turn.role == "user":
            yield from (_markup("USER: "), _user(turn.content), _markup(" "))
        elif turn.role == "assistant":
            yield _markup("GPT:")
            yield from _answer(f" {turn.content}", eos)
    if add_generation_prompt:
        yield _markup("GPT:")


def _plain(turns: Sequence[Turn], context: str, eos: str, add_generation_prompt: bool) -> Iterable[Segment]:
    """The texts alone, a line each; an answer follows its question without a break."""
    begun = False
    for turn in _with_context(turns, context):
        if turn.role == "assistant":
            yield from _answer(turn.content, eos)
        elif turn.content:
            yield from (_markup("\n" if begun else ""), _user(turn.content))
        begun = begun or bool(turn.content)


def _caption(turns: Sequence[Turn], context: str, eos: str, add_generation_prompt: bool) -> Iterable[Segment]:
    """`plain`, with the caption adapters' own question where the user asks nothing."""
    asked = [
        replace(turn, content=turn.content if turn.content.strip() else CAPTION_PROMPT)
        if turn.role == "user"
        else turn
        for turn in turns
    ]
    return _plain(asked, context, eos, add_generation_prompt)


TEMPLATES: Mapping[str, _Template] = {
    # EOS ends an answer; a model that was not trained to write it goes on with a next instruction.
    "alpaca": _Template(_alpaca, stop=("\n\n### Instruction:",)),
    "vicuna_v1": _Template(_vicuna_v1, stop=("###",)),
    "bair_v1": _Template(_bair_v1),
    "caption": _Template(_caption),
    "plain": _Template(_plain),
}
