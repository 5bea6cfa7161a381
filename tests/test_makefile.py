"""What `make` makes of a machine that lacks something."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the environment's rule reads, and a Python whose `-m venv` makes a pip that does nothing."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    write_program(
        tmp_path / "python",
        'mkdir -p "$3/bin" && printf "#!/bin/sh\\n" > "$3/bin/pip" && chmod +x "$3/bin/pip"',
    )
    return tmp_path


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = ["make", f"PYTHON={python}", ".venv/.torch"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_an_environment_without_pip_is_made_again(folder: Path) -> None:
    """As Debian's Python leaves it where its venv is not installed."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    write_program(folder / ".venv" / "bin" / "python", "true")
    done = make(folder, "./python")
    assert done.returncode == 0, done.stderr
    assert (folder / ".venv" / ".torch").exists()


def test_a_python_that_is_missing_is_named_with_what_to_do(folder: Path) -> None:
    done = make(folder, "python-of-nobody")
    assert done.returncode != 0
    assert "python-of-nobody cannot make an environment" in done.stderr
    assert "PYTHON=" in done.stderr
