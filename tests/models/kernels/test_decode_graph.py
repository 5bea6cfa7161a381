"""What becomes of a graph whose recording fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from support import CONFIGS, random_base

from models.adaptation import AdapterBank
from models.kernels.decode_graph import DecodeGraphs
from models.kv_cache import Decode, KVCache, PromptCache


@contextmanager
def recording(*_: Any, **__: Any) -> Iterator[None]:
    yield


def test_a_graph_that_was_not_recorded_is_recorded_again(monkeypatch: pytest.MonkeyPatch):
    """Run, it would compute nothing, and the logits would be those of the step before."""
    base, graph = random_base(CONFIGS["gqa"]), MagicMock()
    kv_cache = KVCache(base.config, 3, 4, base.dtype, base.device)
    prompts = PromptCache(base.config, 2, base.dtype, base.device)
    bank = AdapterBank(base, 2)
    graphs = DecodeGraphs(base, kv_cache, prompts, bank, max_rows=2, max_blocks=2, spare_block=2)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(graphs, "_pool", (0, 0))
    calls = iter([None, ZeroDivisionError, None, None])  # before and in the first recording, and the second

    def compute(num_rows: int, active: list[int]) -> None:
        error = next(calls)
        if error is not None:
            raise error

    monkeypatch.setattr(graphs, "_compute", compute)
    step = [Decode(0, 1, (0,), 0, 0)]
    with pytest.raises(ZeroDivisionError):
        graphs.run(step)
    for _ in range(2):
        graphs.run(step)
    assert next(calls, "all were made") == "all were made"
    assert graph.replay.call_count == 2
