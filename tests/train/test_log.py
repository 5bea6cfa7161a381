"""What a training tells where there is no terminal."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from train import log
from train.log import open_log

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
