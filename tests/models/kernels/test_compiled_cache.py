"""What numba keeps is used again, until any kernel's source changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROBE = """
from models.kernels.scalars_cpu import jit
from models.kernels.tile_cpu import ROWS

@jit
def rows():
    return ROWS

print(rows(), sum(rows.stats.cache_hits.values()))
"""


def test_a_constant_of_another_file_is_not_kept(tmp_path: Path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "models" / "kernels", tmp_path / "models" / "kernels", ignore=ignored)
    (tmp_path / "probe.py").write_text(PROBE)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def rows_and_hits() -> list[str]:
        command = [sys.executable, "probe.py"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    rows, hits = rows_and_hits()
    assert hits == "0"
    assert rows_and_hits() == [rows, "1"]
    with (tmp_path / "models" / "kernels" / "tile_cpu.py").open("a") as file:
        file.write(f"\nROWS = {int(rows) + 5}\n")
    assert rows_and_hits() == [str(int(rows) + 5), "0"]
