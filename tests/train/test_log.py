"""What a training tells: on a console that is no terminal, and in its log."""

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from train import log
from train.errors import TrainError
from train.log import LOG, open_log, read_log

STEP = {"loss": 1.5, "tokens_per_second": 2000.0}


def told(folder: Path, *, terminal: bool) -> list[str]:
    out = StringIO()
    with open_log(folder, 0, 3, Console(file=out, force_terminal=terminal, width=200)) as opened:
        for step in (1, 2, 3):
            opened.step(step, STEP)
    return [line for line in out.getvalue().splitlines() if line.startswith("step ") and " of 3" in line]


def test_a_line_now_and_then_stands_for_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert told(tmp_path / "rarely", terminal=False) == []
    monkeypatch.setattr(log, "_TELL_SECONDS", 0.0)
    assert told(tmp_path / "always", terminal=False) == [
        f"step {step} of 3: loss 1.500, 2,000 tokens/s" for step in (1, 2, 3)
    ]
    assert told(tmp_path / "terminal", terminal=True) == []


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_what_is_no_number_is_null_in_the_log_and_nan_to_readers(tmp_path: Path):
    """float16's scaler skips steps whose gradients overflowed; these are told all the same."""
    console = Console(file=StringIO())
    with open_log(tmp_path, 0, 3, console) as opened:
        opened.step(1, STEP | {"gradient_norm": math.inf})
        opened.evaluation(1, {"instruct": math.nan}, [0.5, -math.inf])
    with open_log(tmp_path, 1, 3, console):  # a run that goes on writes the lines again
        pass
    step, evaluation = (
        json.loads(line, parse_constant=no_constant) for line in (tmp_path / LOG).read_text().splitlines()
    )
    assert step == {"step": 1, "gradient_norm": None} | STEP
    assert evaluation == {"step": 1, "held_out": {"instruct": None}, "gates": [0.5, None]}
    step, evaluation = read_log(tmp_path)
    assert math.isnan(step["gradient_norm"])
    assert math.isnan(evaluation["held_out"]["instruct"])


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2, "lo\n', "\0\0\0\n", "2", "\x80"])
def test_the_last_line_may_be_torn_and_no_other(tmp_path: Path, torn: str):
    (tmp_path / LOG).write_text('{"step": 1}\n' + torn, encoding="latin-1")
    assert read_log(tmp_path) == [{"step": 1}]
    (tmp_path / LOG).write_text(f'{{"step": 1}}\n{torn.strip()}\n{{"step": 3}}\n', encoding="latin-1")
    with pytest.raises(TrainError, match=r"log\.jsonl:2: is damaged; remove the line"):
        read_log(tmp_path)
