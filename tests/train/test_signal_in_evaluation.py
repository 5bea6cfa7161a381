"""A signal during an evaluation: it ends there, what was learnt is saved, and nothing is measured twice."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_files import train

from train.forward import Forward
from train.log import read_log

pytestmark = pytest.mark.long


def signal_in_evaluation(number: int, patch: pytest.MonkeyPatch) -> list[int]:
    """SIGTERM during the pass of that number; the list counts passes."""
    loss, passes = Forward.loss, list[int]()

    def told(self: Forward, *rest: Any) -> torch.Tensor:
        passes.append(len(passes))
        if len(passes) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *rest)

    patch.setattr(Forward, "loss", told)
    return passes


def test_a_signal_ends_an_evaluation_and_saves(recipe: str, run: Path, tmp_path: Path):
    often = [
        "data.instruct.holdout=0.4",
        "compute.pass_tokens=2",
        "keep.checkpoint_every=100",
        "keep.evaluate_every=4",
    ]
    train(recipe, [*often, f"output={tmp_path / 'whole'}"])
    with pytest.MonkeyPatch.context() as patch:
        passes = signal_in_evaluation(2, patch)
        train(recipe, often)
    assert len(passes) == 2
    assert not (run / "checkpoints").exists()  # before the first step
    with pytest.MonkeyPatch.context() as patch:
        held_out = json.loads((tmp_path / "whole/data/instruct/summary.json").read_text())["held_out"]
        passes = signal_in_evaluation(held_out + 1, patch)  # the first after step 4
        train(recipe, often)
    assert len(passes) == held_out + 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000004"]
    train(recipe, [*often, "resume=true"])
    whole, parts = (
        [(line["step"], line.get("loss"), line.get("held_out")) for line in read_log(folder)]
        for folder in (tmp_path / "whole", run)
    )
    assert parts == whole
