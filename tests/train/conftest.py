"""What trainings on a tiny base need."""

from pathlib import Path

import pytest
from tiny_base import write_tiny_base
from train_files import text_recipe, write_captions, write_instructions, write_recipe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("instructions") / "rows.jsonl")


@pytest.fixture(scope="session")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`captions.jsonl`, its images beside it."""
    return write_captions(tmp_path_factory.mktemp("pictures") / "captioned")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder that `recipe` names."""
    return tmp_path / "run"


@pytest.fixture
def recipe(tiny: Path, instructions: Path, tmp_path: Path, run: Path) -> str:
    """The file of a recipe: a text adapter for the tiny base."""
    return write_recipe(tmp_path / "r.yaml", text_recipe(tiny, run, instructions))
