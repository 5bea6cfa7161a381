"""A prompt's log-probabilities travel in lines of bounded size, whichever engine has them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from opentelemetry.trace import INVALID_SPAN
from torch import Tensor

from server.worker.messages import (
    EVENT,
    Finished,
    GenerateRequest,
    PromptScored,
    SamplingParams,
    Scheduled,
    Started,
    TextPrompt,
    TokenLogprob,
    Usage,
    join_scores,
    score_pieces,
)
from server.worker.request import Prepared
from server.worker.scores import score_prompt
from server.worker.tracing import GenerationTrace
from server.worker.vllm_answer import Answer


class Letters:
    """A tokenizer whose tokens are code points."""

    eos_ids = frozenset({1})
    strips_leading_space = False

    def token_bytes(self, id: int) -> bytes:
        return chr(id).encode()

    def partial_bytes(self, id: int) -> None:
        return None

    def token_text(self, id: int) -> str:
        return chr(id)

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class Logprob:
    logprob: float
    rank: int


def scores(number: int) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(i, f"{i}", -float(i)) for i in range(number))


@pytest.mark.parametrize("number", [0, 1, 255, 256, 257, 1000])
def test_pieces_are_the_whole(number: int) -> None:
    pieces = list(score_pieces(scores(number), "all of it"))
    assert all(len(piece.logprobs) <= 256 for piece in pieces)
    assert [piece.more for piece in pieces] == [True] * (len(pieces) - 1) + [False] * bool(pieces)
    if pieces:
        assert join_scores(pieces) == PromptScored(scores(number), "all of it")


def test_what_comes_before_the_end_says_that_more_follows() -> None:
    pieces = [*score_pieces(scores(300), None), *score_pieces(scores(10), "")]  # of special tokens alone
    assert [(len(piece.logprobs), piece.more) for piece in pieces] == [(256, True), (44, True), (10, False)]
    assert all(piece.text == "" for piece in pieces)


def test_vllms_scores_come_in_pieces_too() -> None:
    ids = [97 + i % 26 for i in range(600)]
    params = SamplingParams(prompt_logprobs=1)
    answer = Answer(Prepared("r", ids, params, max_tokens=0, stop=()), Letters())  # type: ignore[arg-type]
    steps: list[Any] = [None, *({id: Logprob(-0.5, 1), 65: Logprob(-0.9, 2)} for id in ids[1:])]
    pieces = list(answer.score_prompt(steps))
    assert [len(piece.logprobs) for piece in pieces if isinstance(piece, PromptScored)] == [256, 256, 88]
    assert max(len(EVENT.dump_json(piece)) for piece in pieces) < 2**16
    whole = join_scores([piece for piece in pieces if isinstance(piece, PromptScored)])
    assert whole.text == Letters().decode(ids)
    assert [token.token_id for token in whole.logprobs] == ids
    assert [token.logprob for token in whole.logprobs] == [None] + [-0.5] * 599
    assert {len(token.top) for token in whole.logprobs[1:]} == {1}


def test_vllms_scores_are_described_as_they_are_sent() -> None:
    """All at once, a long prompt's would hold up everybody's events."""
    described: list[int] = []

    class Watched(Letters):
        def token_text(self, id: int) -> str:
            described.append(id)
            return super().token_text(id)

    params = SamplingParams(prompt_logprobs=0)
    prepared = Prepared("r", [97] * 600, params, max_tokens=0, stop=())
    answer = Answer(prepared, Watched())  # type: ignore[arg-type]
    pieces = iter(answer.score_prompt([None, *({97: Logprob(-0.5, 1)} for _ in range(599))]))
    next(pieces)
    assert len(described) == 256


def test_the_prompt_is_filled_until_its_last_score(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    class Watched:
        def start_span(self, name: str, *_: Any, **__: Any) -> Any:
            begun.append(name)
            return INVALID_SPAN

    monkeypatch.setattr("server.worker.tracing.tracer", Watched)
    trace = GenerationTrace(GenerateRequest("r", "base", TextPrompt("x")))
    first, last = score_pieces(scores(300), "x")
    seen = []
    for event in (Started(300), Scheduled(0.1), first, last, Finished("length", Usage(300, 0))):
        trace.see(event)
        seen.append(begun[-1])
    assert seen == ["queue", "prefill", "prefill", "decode", "decode"]


def test_a_long_prompt_is_scored_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log softmax of all rows would take as much memory as their logits, which nobody reckons with."""
    ids = [97 + i % 26 for i in range(150)]
    logits_TV = torch.randn(len(ids), 128, generator=torch.Generator().manual_seed(0))
    exact_TV = logits_TV.double().log_softmax(-1)
    sizes: list[int] = []
    log_softmax = Tensor.log_softmax

    def counted(rows: Tensor, dim: int) -> Tensor:
        sizes.append(len(rows))
        return log_softmax(rows, dim)

    monkeypatch.setattr(Tensor, "log_softmax", counted)
    pieces: list[Any] = []
    request = SimpleNamespace(
        seq=SimpleNamespace(token_ids=ids, num_prompt_tokens=len(ids)),
        prepared=SimpleNamespace(sampling=SamplingParams(prompt_logprobs=1)),
        num_scored=0,
        emit=pieces.append,
    )
    assert score_prompt(Letters(), request, 0, logits_TV)  # type: ignore[arg-type]
    assert max(sizes) <= 64
    scored = join_scores(pieces).logprobs
    assert [told.token_id for told in scored] == ids
    told_T = torch.tensor([told.logprob for told in scored[1:]], dtype=torch.float64)
    torch.testing.assert_close(told_T, exact_TV[range(len(ids) - 1), ids[1:]], atol=1e-5, rtol=0)
