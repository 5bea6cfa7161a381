"""The bench of decoding on a GPU runs where there is none, at a size that says nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_every_contender_at_every_size(tmp_path: Path):
    command = [sys.executable, "bench/decode_gpu.py", "--shape", "tiny", "--device", "cpu"]
    options = [
        "--batches",
        "1,9",
        "--context",
        "20",
        "--steps",
        "3",
        "--rounds",
        "2",
        "--output",
        str(tmp_path),
    ]
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    rows = json.loads((tmp_path / "decode_gpu.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1] * 5 + [9] * 5
    assert len({row["contender"] for row in rows}) == 5
    assert all(row["over_base"] == [1, 1, 1] for row in rows if row["contender"] == "bare base")
    assert all(0 < row["of_floor"] and 0 < row["ms"] for row in rows)
    assert "| 8 V2 adapters mixed | 9 |" in (tmp_path / "decode_gpu.md").read_text()


def test_no_sequence_ends_before_the_last_one_has_begun(monkeypatch: pytest.MonkeyPatch):
    """However many steps the prompts take: a step that is timed has all of them."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import decode_gpu

    monkeypatch.setattr(decode_gpu, "_STEP_TOKENS", 13)
    base = decode_gpu.random_base(decode_gpu.TINY, torch.float32, torch.device("cpu"))
    loop, scheduler = decode_gpu.engine(base, 9, 20 + decode_gpu.loading_steps(9, 20) + 3 + 16)
    step, decoding = loop.step, []
    monkeypatch.setattr(loop, "step", lambda: (step(), decoding.append(scheduler.num_decoding)))
    prompts = [[1] * 20] * 9
    decode_gpu.step_seconds(loop, scheduler, prompts, decode_gpu.contenders(base)[0], 3)
    assert len(decoding) > 3 + 8 + 9
    assert decoding[-4:] == [9] * 4
