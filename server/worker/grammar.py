"""Constrained decoding: which tokens may come next in an answer that is to be JSON or to call tools.

llguidance follows a Lark grammar, with JSON schemas in it, through the bytes of the tokens. Legend:
M rows that have a grammar, V vocabulary, W = ⌈V / 32⌉ words of a mask with a bit for each token.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from threading import Lock
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from models.errors import is_rusts
from models.tokenizer import Tokenizer
from models.tool_text import CALL_CLOSE, CALL_OPEN, CALL_SEPARATOR, call_head
from models.uploads import upload
from server.worker.messages import Grammar, ToolSchema
from server.worker.schema_limits import excess

# A space after comma and colon is the model's choice. More whitespace would add nothing but tokens, and
# small models get lost in it. What llguidance does not know it refuses, unless it may be lenient.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}
_LIMITS = LLParserLimits(step_lexer_fuel=100_000, verbose_errors=False)  # about 7 ms for a row's mask

_ANY_TEXT = r"/(.|\n)*/"
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarError(ValueError):
    """A grammar that cannot be followed; `param` is the field of the request that asks for it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class GrammarState:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher = matcher
        self.param = param

    def fill(self, mask_W: Tensor) -> None:
        """Set the bits of the tokens that may come next, of EOS only where the answer may end."""
        self._matcher.unsafe_compute_mask_ptr(mask_W.data_ptr(), mask_W.numel() * mask_W.element_size())

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """The answer fits, and nothing could be added to it."""
        matcher = self._matcher
        return matcher.is_stopped() and matcher.is_accepting() and not matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further, such as for a pattern that became too large."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else None


class GrammarCompiler:
    """Grammars to states, each grammar compiled once while it is among the last `cache_entries` used.

    Called from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, max_bytes: int, cache_entries: int) -> None:
        self._vocabulary = vocabulary(tokenizer, vocab_size) if tokenizer.eos_ids else None
        self._max_bytes = max_bytes
        self._cache_entries = cache_entries
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def compile(self, grammar: Grammar) -> GrammarState:
        """The state of a new answer. Raises `GrammarError`."""
        key = json.dumps(asdict(grammar))  # in its order: that of properties is the answer's too
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is not None:
                self._compiled.move_to_end(key)
                return GrammarState(matcher.deep_copy(), _param(grammar))
        matcher = self._compile(grammar, len(key))
        with self._lock:
            self._compiled[key] = matcher
            while len(self._compiled) > self._cache_entries:
                self._compiled.popitem(last=False)
            return GrammarState(matcher.deep_copy(), _param(grammar))

    def _compile(self, grammar: Grammar, size: int) -> LLMatcher:
        param = _param(grammar)
        if self._vocabulary is None:
            raise GrammarError("the base has no token that ends an answer, which a grammar needs", param)
        if size > self._max_bytes:
            raise GrammarError(
                f"the schemas have {size} bytes of JSON, of at most {self._max_bytes} (max_grammar_bytes)",
                param,
            )
        if grammar.schema is not None and (reason := self._refusal(grammar.schema, grammar.strict)):
            raise GrammarError(f"the schema cannot be followed: {reason}", "response_format")
        source = lark(grammar, self._parameters)
        matcher = LLMatcher(
            self._vocabulary, LLMatcher.grammar_from_lark(source), log_level=0, limits=_LIMITS
        )
        if matcher.is_error():
            raise GrammarError(f"the schemas cannot be followed: {_one_line(matcher.get_error())}", param)
        return matcher

    def _parameters(self, tool: ToolSchema) -> dict[str, Any]:
        """The schema of a tool's arguments: any object, for one that is not strict and cannot be followed."""
        reason = self._refusal(tool.parameters, tool.strict)
        if reason and tool.strict:
            raise GrammarError(f"the parameters of {tool.name!r} cannot be followed: {reason}", "tools")
        return _ANY_OBJECT if reason else tool.parameters

    def _refusal(self, schema: dict[str, Any], strict: bool) -> str | None:
        too_much = excess(schema)
        if too_much:
            return too_much
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(_styled(schema, strict)))
            message = LLMatcher.validate_grammar(grammar, self._vocabulary, limits=_LIMITS)
        except ValueError as error:  # such as a number that it cannot read
            return _one_line(str(error))
        except BaseException as error:
            if not is_rusts(error):
                raise
            # Met where the library cuts what it complains of in the middle of a character.
            return "it has values that its keywords do not take"
        return _one_line(message) if message else None


def lark(grammar: Grammar, parameters: Callable[[ToolSchema], dict[str, Any]]) -> str:
    """The grammar's text for llguidance; `parameters` gives the schema of a tool's arguments."""
    answer = _answer(grammar)
    if not grammar.tools:
        return f"start: {answer}\n"
    # In free text the calls begin wherever the model first writes so: a lazy terminal ends right there.
    opening = "opening" if grammar.kind == "text" else _literal(CALL_OPEN)
    more = f"({_literal(CALL_SEPARATOR + CALL_OPEN)} call)*" if grammar.parallel_calls else ""
    rules = [
        f"start: {'calls' if answer is None else 'answer | calls'}",
        f"calls: {opening} call {more}",
        "call: " + " | ".join(f"call_{i}" for i in range(len(grammar.tools))),
    ]
    if answer is not None:
        rules.append(f"answer: {answer}")
    if grammar.kind == "text":
        rules.append(f"opening[lazy]: /(.|\\n)*{CALL_OPEN}/")
    for i, tool in enumerate(grammar.tools):
        head, close = _literal(call_head(tool.name)), _literal(CALL_CLOSE)
        rules.append(f"call_{i}: {head} {_json(parameters(tool), tool.strict)} {close}")
    return "\n".join(rules) + "\n"


def _answer(grammar: Grammar) -> str | None:
    """The rule of an answer that calls no tool."""
    match grammar.kind:
        case "text":
            return _ANY_TEXT
        case "json_object":
            return _json(_ANY_OBJECT)
        case "json_schema":
            return _json(grammar.schema or {}, grammar.strict)
        case "tool_calls":
            return None


def _json(schema: dict[str, Any], strict: bool = True) -> str:
    return f"%json {json.dumps(_styled(schema, strict))}"


def _styled(schema: dict[str, Any], strict: bool) -> dict[str, Any]:
    """Not strict: keywords that are not known are passed over, and `oneOf` may be `anyOf`."""
    return schema | {"x-guidance": {**_JSON_STYLE, "lenient": not strict, "coerce_one_of": not strict}}


def _literal(text: str) -> str:
    return json.dumps(text)


def _param(grammar: Grammar) -> str:
    return "tools" if grammar.tools else "response_format"


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]


def constrain(logits_MV: Tensor, states: Sequence[GrammarState | None]) -> None:
    """-inf for every token that the row's grammar does not allow, in place; rows without one stay."""
    rows = [m for m, state in enumerate(states) if state is not None]
    if not rows:
        return
    V = logits_MV.shape[-1]
    mask_MW = torch.zeros(len(rows), -(-V // 32), dtype=torch.int32)
    for row, mask_W in zip(rows, mask_MW, strict=True):
        state = states[row]
        assert state is not None
        state.fill(mask_W)
    banned = upload((~mask_MW).view(torch.uint8), logits_MV.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits_MV.device)
    banned_MV = (banned[:, :, None] >> bits & 1).flatten(1)[:, :V].bool()
    index = upload(rows, logits_MV.device)
    logits_MV[index] = logits_MV[index].masked_fill_(banned_MV, -torch.inf)


class _Vocabulary:
    """A tokenizer as llguidance's `TokenizerWrapper` reads it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        ids = range(vocab_size)
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = min(tokenizer.eos_ids)
        self.special_token_ids = [id for id in ids if not tokenizer.token_bytes(id)]
        self.tokens = [tokenizer.token_bytes(id) or tokenizer.token_text(id).encode() for id in ids]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """The tokens' bytes for llguidance. `vocab_size` is that of the logits; EOS ends an answer."""
    wrapper = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
    return LLTokenizer(wrapper, eos_token=sorted(tokenizer.eos_ids))
