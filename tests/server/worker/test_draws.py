"""A step's tokens with their log-probabilities, which all rows are told of together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.worker.draws import draw
from server.worker.messages import SamplingParams
from server.worker.sampler import SamplerState

V = 32


class Numbers:
    """A tokenizer whose tokens are their numbers."""

    def token_text(self, id: int) -> str:
        return str(id)

    def partial_bytes(self, id: int) -> None:
        return None


def requests(asked: list[int | None]) -> list[Any]:
    params = [SamplingParams(temperature=0, logprobs=num_top) for num_top in asked]
    return [
        SimpleNamespace(prepared=SimpleNamespace(sampling=own), sampler=SamplerState(own, V, (), ()))
        for own in params
    ]


def logits(rows: int) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(0))


def test_each_row_is_told_of_as_many_as_it_asked_for() -> None:
    asked = [None, 2, 0, None, 2, 5]
    logits_MV = logits(len(asked))
    logprobs_MV = logits_MV.log_softmax(-1)
    drawn = draw(Numbers(), requests(asked), logits_MV.clone())  # type: ignore[arg-type]
    assert [row.token for row in drawn] == logits_MV.argmax(-1).tolist()
    for row, num_top, logprobs_V in zip(drawn, asked, logprobs_MV, strict=True):
        if num_top is None:
            assert row.logprob is None
            continue
        assert row.logprob is not None
        values, ids = logprobs_V.topk(num_top)
        assert (row.logprob.token_id, row.logprob.token) == (row.token, str(row.token))
        assert row.logprob.logprob == logprobs_V[row.token].item()
        assert [(top.token_id, top.logprob) for top in row.logprob.top] == [
            *zip(ids.tolist(), values.tolist(), strict=True)
        ]


def test_the_device_is_waited_for_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Tensor] = []
    read = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: (waits.append(tensor), read(tensor))[1])
    draw(Numbers(), requests([3] * 8), logits(8))  # type: ignore[arg-type]
    assert len(waits) == 1  # and of the tokens numpy is asked, on a CPU
