"""Which graphs are kept, with stand-ins for what only a GPU has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from support import CONFIGS, random_adapter, random_base

from models.adaptation import AdapterBank
from models.adapter import base_spec
from models.adapter_config import AdapterConfig, LoraConfig, PromptConfig
from models.kernels import decode_graph
from models.kernels.decode_graph import DecodeGraphs
from models.kv_cache import Decode, KVCache, PromptCache

STEP = [Decode(0, 1, (0,), 0, 0)]


class Recorder:
    """`torch.cuda`'s graphs: all that were made, and the pool that each was recorded into."""

    def __init__(self) -> None:
        self.graphs: list[MagicMock] = []
        self.pools: list[object] = []
        self.num_pools = 0

    def graph(self) -> MagicMock:
        self.graphs.append(MagicMock())
        return self.graphs[-1]

    def pool(self) -> int:
        self.num_pools += 1
        return self.num_pools

    @contextmanager
    def record(self, graph: MagicMock, pool: object, *_: Any, **__: Any) -> Iterator[None]:
        self.pools.append(pool)
        yield


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", recorder.graph)
    monkeypatch.setattr(torch.cuda, "graph", recorder.record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", recorder.pool)
    return recorder


@pytest.fixture
def graphs(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> DecodeGraphs:
    base = random_base(CONFIGS["gqa"])
    kv_cache = KVCache(base.config, 3, 4, base.dtype, base.device)
    prompts = PromptCache(base.config, 3, base.dtype, base.device)
    graphs = DecodeGraphs(
        base, kv_cache, prompts, AdapterBank(base, 3), max_rows=2, max_blocks=2, spare_block=2
    )
    monkeypatch.setattr(graphs, "_pool", recorder.pool())
    monkeypatch.setattr(graphs, "_compute", lambda num_rows, active: None)
    return graphs


def test_a_graph_that_was_not_recorded_is_recorded_again(
    graphs: DecodeGraphs, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    """Run, it would compute nothing, and the logits would be those of the step before."""
    calls = iter([None, ZeroDivisionError, None, None])  # before and in the first recording, and the second

    def compute(num_rows: int, active: list[int]) -> None:
        error = next(calls)
        if error is not None:
            raise error

    monkeypatch.setattr(graphs, "_compute", compute)
    with pytest.raises(ZeroDivisionError):
        graphs.run(STEP)
    for _ in range(2):
        graphs.run(STEP)
    assert next(calls, "all were made") == "all were made"
    failed, recorded = recorder.graphs
    assert not failed.replay.called
    assert recorded.replay.call_count == 2


def test_with_one_graph_that_was_not_recorded_all_go(
    graphs: DecodeGraphs, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    """What they share with it is cuBLAS's workspace, which it takes along."""
    graphs.run(STEP)
    answers = iter([None, ZeroDivisionError])

    def compute(num_rows: int, active: list[int]) -> None:
        error = next(answers, None)
        if error is not None:
            raise error

    monkeypatch.setattr(graphs, "_compute", compute)
    with pytest.raises(ZeroDivisionError):
        graphs.run(STEP * 2)
    graphs.run(STEP)
    first, failed, again = recorder.graphs
    assert failed.reset.called
    assert (first.replay.call_count, again.replay.call_count) == (1, 1)
    assert len(set(recorder.pools[:2])) == 1
    assert recorder.pools[2] not in recorder.pools[:2]


def test_with_longer_prompts_all_are_recorded_anew(graphs: DecodeGraphs, recorder: Recorder):
    """Into another pool: torch refuses one whose graphs are all gone."""
    graphs.run(STEP)
    graphs.run(STEP * 2)
    graphs._prompts.room_for(5)()
    graphs.run(STEP)
    graphs.run(STEP)
    assert [graph.replay.call_count for graph in recorder.graphs] == [1, 1, 2]
    assert recorder.pools == [1, 1, 2]


def test_where_too_many_are_kept_all_are_recorded_anew(
    graphs: DecodeGraphs, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    """Not the one that waited longest: with it goes what the others write to."""
    monkeypatch.setattr(decode_graph, "_KINDS", 1)
    spec = base_spec(graphs._base.config)
    graphs._bank.place(1, random_adapter(AdapterConfig(base=spec, norms=True)))
    norms = [Decode(0, 1, (0,), 1, 0)]
    for step in (STEP, norms, STEP, STEP * 2, STEP * 2, STEP):
        graphs.run(step)
        assert len(graphs._graphs) <= 2
    assert [graph.replay.call_count for graph in recorder.graphs] == [2, 1, 2, 1]
    assert recorder.pools == [1, 1, 2, 2]


def test_what_lies_in_slots_is_recorded_once_for_each_kind(graphs: DecodeGraphs, recorder: Recorder):
    """And then no step of theirs records any. Adapters with low-rank terms have no graphs."""
    spec = base_spec(graphs._base.config)
    norms = AdapterConfig(base=spec, norms=True)
    low_rank = AdapterConfig(base=spec, lora=LoraConfig(rank=2, targets=("wq",)))
    prompts = AdapterConfig(base=spec, prompt=PromptConfig(length=3, layers=(1,)))
    for slot, config in enumerate((norms, low_rank, prompts), 1):
        graphs._bank.place(slot, random_adapter(config))
    graphs.record_all([1, 2, 3])
    assert len(recorder.graphs) == 2 * 2  # one row and two; norms, and no vectors
    for slot in (0, 1, 3):
        for rows in (1, 2):
            graphs.run([Decode(0, 1, (0,), slot, 0)] * rows)
    assert len(recorder.graphs) == 2 * 2
