"""A base's own chat template: Jinja in the sandbox that transformers uses, safe against its input.

A template's text and a user's come out of Jinja as one string. To tell them apart where it matters,
the first character of every special token's text in the input is swapped for a noncharacter before
rendering and back after it, as a segment that is no markup; so no tokenizer can read it as a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import PromptError
from models.tokenizer import Segment, Tokenizer

_MAX_LEVELS = 100  # of a call's arguments; what walks through them calls itself
_PIECE = 1 << 16  # characters that one search looks through: while it does, no other thread runs
_NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made earlier. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    def message(self) -> dict[str, Any]:
        """As templates expect it, the arguments as an object where they are one, else as text."""
        try:
            parsed = json.loads(self.arguments)
            arguments = parsed if _is_shallow(parsed, _MAX_LEVELS) else self.arguments
        except (ValueError, RecursionError):
            arguments = self.arguments
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }


def _is_shallow(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_shallow(item, levels - 1) for item in items)


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
) -> list[Segment]:
    """The conversation by the tokenizer's chat template; BOS is in it where the template writes it.

    Without `add_generation_prompt` the answers are flagged `generated`, up to and with the EOS that
    ends each. Raises PromptError where there is no template, where it refuses the conversation, or
    where it has no place for `tools`.
    """
    if tokenizer.chat_template is None:
        raise PromptError(
            "the base has no chat template; use an adapter with a template of its own, or put a "
            "chat_template.jinja beside the base's weights"
        )
    template, variables = _compile(tokenizer.chat_template)
    if tools and "tools" not in variables:
        raise PromptError("the model's chat template has no place for tools; leave them out")
    shield = _Shield(tokenizer.special_texts)

    def render(count: int, ask: bool) -> str:
        return _render(
            template,
            messages=shield.cover(list(messages[:count])),
            tools=shield.cover(list(tools)) or None,
            add_generation_prompt=ask,
            bos_token="" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
            eos_token="" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id),
        )

    text = render(len(messages), add_generation_prompt)
    answers = [] if add_generation_prompt else _answers(text, messages, render, tokenizer)
    return list(_segments(text, shield, answers))


class _Shield:
    """Swaps characters that could begin a special token for noncharacters, and knows the way back."""

    def __init__(self, special_texts: Sequence[str]) -> None:
        firsts = sorted({text[0] for text in special_texts if text})
        if len(firsts) > len(_NONCHARACTERS):
            raise PromptError("the base's special tokens begin with too many different characters")
        self._cover = dict(zip(firsts, _NONCHARACTERS, strict=False))
        self.uncover = {cover: first for first, cover in self._cover.items()}
        rests = {first: [t[1:] for t in special_texts if t.startswith(first)] for first in firsts}
        self._tokens = re.compile(
            "|".join(f"{re.escape(first)}(?={'|'.join(map(re.escape, rests[first]))})" for first in firsts)
            or "(?!)"
        )
        # At the end of a text even the beginning of a token counts: what follows might complete it.
        self._beginnings = {text[:size] for text in special_texts for size in range(1, len(text))}
        self._longest = max(map(len, special_texts), default=0)

    def cover(self, value: Any) -> Any:
        """A value as JSON has them, all strings in it covered, keys included."""
        if isinstance(value, str):
            return self._cover_text(value)
        if isinstance(value, Mapping):
            return {self.cover(key): self.cover(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.cover(item) for item in value]
        return value

    def _cover_text(self, text: str) -> str:
        if any(char in text for char in _NONCHARACTERS):
            text = re.sub(f"[{_NONCHARACTERS}]", "\ufffd", text)
        tail = len(text)
        for size in range(1, min(self._longest, len(text)) + 1):
            if text[-size:] in self._beginnings:
                tail = len(text) - size
        head = "".join(self._cover_tokens(text, at) for at in range(0, len(text), _PIECE))
        return head[:tail] + "".join(self._cover.get(char, char) for char in head[tail:])

    def _cover_tokens(self, text: str, at: int) -> str:
        """One piece, a character for a character; a token may reach beyond it."""
        seen = text[at : at + _PIECE + self._longest]
        return self._tokens.sub(lambda match: self._cover[match[0]], seen)[:_PIECE]


def _answers(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    render: Callable[[int, bool], str],
    tokenizer: Tokenizer,
) -> list[tuple[int, int]]:
    """[start, end) of what the model wrote: from the generation prompt to the EOS, answer by answer."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, upto = render(index, True), render(index + 1, False)
        if not upto.startswith(before) or not text.startswith(upto):
            raise PromptError(
                "the model's chat template rewrites earlier turns, so that its answers cannot be told "
                "apart; train with another template"
            )
        ends = [
            upto.rfind(eos) + len(eos) for eos in map(tokenizer.token_text, tokenizer.eos_ids) if eos in upto
        ]
        spans.append((len(before), max((end for end in ends if end > len(before)), default=len(upto))))
    return spans


def _segments(text: str, shield: _Shield, answers: Sequence[tuple[int, int]]) -> Iterator[Segment]:
    """Cut where the template's text ends and where answers do, and uncover."""
    covered = [match.start() for match in re.finditer(f"[{_NONCHARACTERS}]", text)]
    cuts = {0, len(text), *covered, *(at + 1 for at in covered), *(at for span in answers for at in span)}
    for start, end in pairwise(sorted(cuts)):
        generated = any(first <= start and end <= last for first, last in answers)
        piece = text[start:end]
        yield Segment(shield.uncover.get(piece, piece), piece not in shield.uncover, generated)


def _render(template: Template, **variables: Any) -> str:
    try:
        return template.render(**variables)
    except Exception as error:  # a template is a program, which may fail in any way
        raise PromptError(f"the model's chat template refuses the conversation: {error}") from error


class _Generation(Extension):
    """`{% generation %}` marks answers for other trainers; here its body is rendered and no more."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def _compile(source: str) -> tuple[Template, frozenset[str]]:
    """The template, and the variables that it reads."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source), frozenset(
            meta.find_undeclared_variables(environment.parse(source))
        )
    except TemplateError as error:
        raise PromptError(f"the base's chat template is damaged: {error}; fetch the base again") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it, but never in ASCII: escapes would hide what `_Shield` covered."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
