"""What pip installs, and so the container image: the files beside the code come with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_base import write_adapter

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built of what the Dockerfile copies, and of an adapter `poet`."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for folder in ("server", "models", "experts", "train"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    poet = source / "models" / "shipped" / "poet"
    write_adapter(poet, "v1")
    (poet / "README.md").write_text("# poet\n")
    (poet / "loss.png").write_bytes(b"\x89PNG")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(wheels)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [wheel] = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_shipped_adapters_are_packed(packed: set[str]) -> None:
    files = ("adapter.json", "adapter.safetensors", "README.md", "loss.png")
    assert {f"models/shipped/poet/{file}" for file in files} <= packed


def test_everything_that_stands_beside_the_code_is_packed(packed: set[str]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "server", "models", "experts", "train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()
    assert set(tracked) - packed == set()
