"""The steps' rows are a function of recipe and step alone, and every row has its turn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.plan import Plan, SourcePlan
from train.errors import TrainError


def plan(
    sizes: list[int], batch_size: int, epochs: float = 1, seed: int = 0, max_steps: int | None = None
) -> Plan:
    sources = [SourcePlan(f"s{i}", np.arange(size) * 10 + i, epochs) for i, size in enumerate(sizes)]
    return Plan(sources, batch_size, seed, max_steps)


@given(
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=3),
    batch_size=st.integers(1, 5),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_each_epoch_shows_each_row_once(sizes: list[int], batch_size: int, epochs: int, seed: int):
    steps = plan(sizes, batch_size, epochs, seed)
    again = plan(sizes, batch_size, epochs, seed)
    seen: dict[int, list[int]] = {i: [] for i in range(len(sizes))}
    for step in range(len(steps)):
        rows = steps.rows(step).tolist()
        assert len(rows) == batch_size
        assert {row % 10 for row in rows} == {int(steps.source_of_step[step])}
        seen[int(steps.source_of_step[step])] += rows
    for i, size in enumerate(sizes):
        per_epoch = size // batch_size * batch_size
        epochs_seen = [seen[i][k : k + per_epoch] for k in range(0, len(seen[i]), per_epoch)]
        assert len(epochs_seen) == epochs
        assert all(len(set(rows)) == per_epoch for rows in epochs_seen)
    # From any step on, in any order: nothing is remembered.
    for step in reversed(range(len(again))):
        assert again.rows(step).tolist() == steps.rows(step).tolist()


def test_order_follows_the_seed():
    one, two = (plan([64, 32], 4, 2, seed) for seed in (1, 2))
    assert one.source_of_step.tolist() != two.source_of_step.tolist()
    assert sorted(one.source_of_step.tolist()) == [0] * 32 + [1] * 16
    assert plan([64], 4, 2).rows(0).tolist() != plan([64], 4, 2).rows(16).tolist()


def test_parts_of_epochs_and_a_limit():
    assert len(plan([40], 4, 0.5)) == 5
    assert len(plan([40], 4, 0.01)) == 1
    assert len(plan([40], 4, 2, max_steps=3)) == 3


def test_a_source_smaller_than_a_step():
    with pytest.raises(TrainError, match=r"data\.s1: has 3 rows .* lower optimizer\.batch_size"):
        plan([40, 3], 4)


def test_many_sources():
    """A type of 8 bits would call the 257th source 0."""
    steps = plan([4] * 300, 4)
    assert sorted(steps.source_of_step.tolist()) == list(range(300))
