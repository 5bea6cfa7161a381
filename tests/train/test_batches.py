"""Passes of few sizes: what is filled in is bounded and changes neither losses nor gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from train_files import text_recipe, write_recipe

from train.build import Run, build
from train.data.batches import Pass, _filler, make_passes
from train.data.store import Store
from train.errors import TrainError
from train.processes import Processes, StopSignal
from train.recipe import load_recipe


@pytest.fixture
def run(tiny: Path, instructions: Path, tmp_path: Path) -> Run:
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", text_recipe(tiny, tmp_path / "run", instructions)))
    return build(recipe, tmp_path, Processes(0, 1, torch.device("cpu")), StopSignal(), Console(stderr=True))


@given(lens=st.lists(st.integers(1, 512), min_size=1, max_size=64))
def test_a_sixteenth_at_most_in_sequences_no_longer_than_there_are(lens: list[int]):
    filler = _filler(lens)
    assert 16 * sum(filler) <= sum(lens)
    assert all(0 < length <= max(lens) for length in filler)


def test_sizes_are_few():
    sizes = {total + sum(_filler([total])) for total in range(1, 4097)}
    assert len(sizes) < 16 * 12


def without_filler(batch: Pass, num_rows: int) -> Pass:
    lens = batch.lens_B[:num_rows]
    return replace(
        batch,
        tokens_N=batch.tokens_N[: sum(lens)],
        positions_N=batch.positions_N[: sum(lens)],
        lens_B=lens,
        image_B=batch.image_B[:num_rows],
    )


def test_filler_changes_nothing(run: Run):
    [store] = run.stores.values()
    forward, adapter = run.trainer._forward, run.adapter
    torch.nn.init.normal_(adapter.gate)  # open gates, so that every parameter has a gradient
    rows = [int(row) for row in store.train]
    [filled] = make_passes(store, rows, run.read_image, 1 << 14)
    plain = without_filler(filled, len(rows))
    assert len(filled.tokens_N) > len(plain.tokens_N) == sum(store.length(row) for row in rows)
    results = []
    for batch in (filled, plain):
        loss = forward.backward(batch, 1.0)
        results.append(
            (loss, {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None})
        )
        adapter.zero_grad()
    (loss, grads), (wanted, wanted_grads) = results
    torch.testing.assert_close(loss, wanted)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted_grads[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_cannot_read_is_one_sentence(run: Run, workers: int, monkeypatch: pytest.MonkeyPatch):
    def gone(store: Store, row: int) -> None:
        raise TrainError("a.png: was readable when the training began")

    monkeypatch.setattr(Store, "tokens", gone)
    steps = run.steps.load(0, workers)
    with pytest.raises(TrainError) as caught:
        next(steps)
    assert str(caught.value) == "a.png: was readable when the training began"
