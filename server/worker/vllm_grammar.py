"""Constrained decoding within vLLM: the grammars of `server.worker.grammar`, as its logits processor.

It runs where vLLM samples. A request brings its `Grammar` as JSON in `extra_args`; both sides follow it
through the same tokens, this one to say what may come next, the engine to know when the answer is whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from models.tokenizer import load_tokenizer
from server.worker.grammar import GrammarCompiler, GrammarState, constrain
from server.worker.messages import Grammar

KEY = "llama_adapter_grammar"

_GRAMMAR: TypeAdapter[Grammar] = TypeAdapter(Grammar)


def grammar_args(grammar: Grammar | None) -> dict[str, Any] | None:
    """`extra_args` of a request that has this grammar."""
    return None if grammar is None else {KEY: _GRAMMAR.dump_json(grammar).decode()}


class _Row:
    """One request of the batch: its grammar, and its tokens, a list that vLLM appends to."""

    def __init__(self, state: GrammarState, tokens: list[int]) -> None:
        self._state = state
        self._tokens = tokens
        self._taken = 0

    def current(self) -> GrammarState | None:
        """The state after all tokens; None once it cannot be followed, which the engine finds out too."""
        for token in self._tokens[self._taken :]:
            self._state.take(token)
        self._taken = len(self._tokens)
        return None if self._state.error else self._state


class GrammarProcessor(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        # Made before anybody waits: it reads all tokens.
        tokenizer, vocab_size = load_tokenizer(Path(model.model)), model.get_vocab_size()
        self._compiler = GrammarCompiler(tokenizer, vocab_size, max_bytes=2**31, cache_entries=128)
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, tokens in batch_update.added:
            self._rows.pop(index, None)
            text = (params.extra_args or {}).get(KEY)
            if text is not None:
                self._rows[index] = _Row(self._compile(text), tokens)
        for a, b, direction in batch_update.moved:
            row_a, row_b = self._rows.pop(a, None), self._rows.pop(b, None)
            if row_a is not None:
                self._rows[b] = row_a
            if row_b is not None and direction == MoveDirectionality.SWAP:
                self._rows[a] = row_b

    def apply(self, logits: Tensor) -> Tensor:
        states = [self._rows[m].current() if m in self._rows else None for m in range(len(logits))]
        constrain(logits, states)
        return logits

    def _compile(self, text: str) -> GrammarState:
        """The engine has compiled it already: it is neither too large nor impossible to follow."""
        return self._compiler.compile(_GRAMMAR.validate_json(text))
