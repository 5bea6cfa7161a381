"""What numba keeps is used again, until any kernel's source changes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

from models.kernels.compiled_cache import OneAtATime
from models.kernels.scalars_cpu import jit

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


def _save_all(folder: Path, own: int) -> None:
    for number in range(20):
        OneAtATime(str(folder), "f", "stamp").save((own, number), [own, number])


def test_what_several_processes_compile_at_once_is_kept_and_never_mixed_up(tmp_path: Path):
    """With numba's own class a third of them is lost or another's."""
    start = multiprocessing.get_context("spawn")
    processes = [start.Process(target=_save_all, args=(tmp_path, own)) for own in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    kept = OneAtATime(str(tmp_path), "f", "stamp")
    for own in range(4):
        for number in range(20):
            assert kept.load((own, number)) == [own, number]


def test_kernels_are_kept_so():
    @jit
    def one():
        return 1

    assert isinstance(one._cache._cache_file, OneAtATime)


def test_where_nothing_can_be_written_it_is_read_all_the_same(tmp_path: Path):
    OneAtATime(str(tmp_path), "f", "stamp").save("key", "data")
    (tmp_path / "f.nbi.lock").unlink()
    (tmp_path / "f.nbi.lock").mkdir()  # which no one can open to write, root neither
    assert OneAtATime(str(tmp_path), "f", "stamp").load("key") == "data"
    assert OneAtATime(str(tmp_path / "nowhere"), "f", "stamp").load("key") is None
