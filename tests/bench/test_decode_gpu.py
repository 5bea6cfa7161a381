"""The bench of decoding on a GPU runs where there is none, at a size that says nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
